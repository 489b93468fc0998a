"""Our own attention and head, against their definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ddp.kernels import BLOCK_ROWS, HEAD_ROWS, PRODUCT_ROWS, causal_attention, gelu, head_loss


def off(found: Tensor, wanted: Tensor) -> float:
    """How far `found` is from `wanted`, as a share of its length."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def defined_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("spread", [1, 4, 16], ids=lambda spread: f"scores of deviation {spread}")
@pytest.mark.parametrize("length", [5, 2 * BLOCK_ROWS + 44])
def test_attention_is_nearly_as_good_as_pytorchs(spread: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    heads = (
        torch.randn(3, 2, 3, length, 64, generator=generator)
        * torch.tensor([math.sqrt(spread)] * 2 + [1.0])[:, None, None, None, None]
    )
    heads = heads.bfloat16()
    upstream = torch.randn(2, 3, length, 64, generator=generator).bfloat16()

    def outcome(attention: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaf = heads.to(dtype, copy=True).requires_grad_()
        y = attention(*leaf)
        y.backward(upstream.to(dtype))
        assert leaf.grad is not None
        assert y.dtype == dtype
        return (y.detach(), *leaf.grad)

    wanted = outcome(defined_attention, torch.float64)
    theirs = outcome(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), torch.bfloat16)
    ours = outcome(causal_attention, torch.bfloat16)
    for our, their, want in zip(ours, theirs, wanted, strict=True):
        assert off(our, want) < max(0.006, 2 * off(their, want))


def test_compiled_attention_is_the_same() -> None:
    """And compiled as a whole: what the compiler cannot read it would leave, unseen, to slower operations."""
    heads = torch.randn(3, 1, 2, 3 * BLOCK_ROWS + 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    eager, compiled = heads.clone().requires_grad_(), heads.clone().requires_grad_()
    causal_attention(*eager).float().square().sum().backward()
    torch.compile(causal_attention, fullgraph=True)(*compiled).float().square().sum().backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    assert off(compiled.grad, eager.grad) < 0.01


def test_attention_of_views_and_without_gradients() -> None:
    """As the model calls it: q, k and v lie between each other in memory."""
    qkv = torch.randn(2, 70, 3, 4, 64).bfloat16().permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        assert off(causal_attention(*qkv), defined_attention(*qkv.double())) < 0.006


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_compiled_gelu_is_pytorchs(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.cat((torch.linspace(-30, 30, 1001), torch.randn(1000))).to(dtype).requires_grad_()
    y = torch.compile(gelu, backend="aot_eager")(x)
    y.float().sum().backward()
    true = x.detach().double().requires_grad_()
    F.gelu(true, approximate="tanh").sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert true.grad is not None
    assert off(y.detach(), F.gelu(true, approximate="tanh").detach()) < tolerance
    assert off(x.grad, true.grad) < tolerance


@pytest.mark.parametrize("rows", [7, 64, 300, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_the_head_is_its_definition(rows: int, dtype: torch.dtype | None, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 16, generator=generator).requires_grad_()
    vocab_size = PRODUCT_ROWS + 300
    weight = torch.randn(vocab_size, 16, generator=generator).requires_grad_()
    targets = torch.randint(vocab_size, (300,), generator=generator)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = head_loss(features, weight, targets, rows)
        with torch.no_grad():
            assert torch.equal(head_loss(features, weight, targets, rows), loss)
    (3 * loss).backward()
    found = features.grad, weight.grad
    features.grad = weight.grad = None
    wanted = F.cross_entropy(features.double() @ weight.double().T, targets)
    (3 * wanted).backward()
    assert loss.dtype == torch.float32
    loss, wanted = loss.detach(), wanted.detach()
    assert float(loss) == pytest.approx(float(wanted), rel=tolerance)
    for ours, true in zip(found, (features.grad, weight.grad), strict=True):
        assert ours is not None
        assert true is not None
        assert off(ours, true) < tolerance


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_never_exist_all_at_once() -> None:
    rows = HEAD_ROWS["cpu"]
    features, weight = torch.randn(4 * rows, 8).requires_grad_(), torch.randn(100, 8).requires_grad_()
    with Largest() as seen:
        head_loss(features, weight, torch.zeros(4 * rows, dtype=torch.int64)).backward()
    assert seen.elements == rows * 100
