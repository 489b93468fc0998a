"""Our own attention and head, against their definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ddp.model.attention import causal_attention
from gpt2_ddp.model.block_attention import BLOCK_ROWS
from gpt2_ddp.model.head import CPU_HEAD_ROWS, PRODUCT_ROWS, add_product, head_loss, head_rows_for
from gpt2_ddp.model.layers import GELU


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
    heads = torch.randn(3, 1, 2, BLOCK_ROWS + 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
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
    y = torch.compile(GELU(), backend="aot_eager")(x)
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
            assert float(head_loss(features, weight, targets, rows)) == pytest.approx(float(loss), rel=1e-6)
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
    """Remembers the most elements of any tensor that is made, and the operations."""

    elements = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_never_exist_all_at_once() -> None:
    rows = CPU_HEAD_ROWS
    features, weight = torch.randn(4 * rows, 8).requires_grad_(), torch.randn(100, 8).requires_grad_()
    with Largest() as seen:
        head_loss(features, weight, torch.zeros(4 * rows, dtype=torch.int64)).backward()
    assert seen.elements == rows * 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_product_is_not_rounded_where_that_would_be_infinite(dtype: torch.dtype, tolerance: float) -> None:
    """One target that dominates: 2,000 gradients of nearly 1 times features of 60 are past float16's 65504."""
    left, right = torch.full((2000, 3), -0.99).to(dtype), torch.full((2000, 4), 60.0).to(dtype)
    total = torch.ones(3, 4)
    add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left.float().T @ right.float(), rtol=tolerance, atol=0)


def test_a_gpu_adds_the_product_in_float32() -> None:
    """By shapes and dtypes alone, through the call that a GPU takes."""
    total, left, right = (torch.empty(0, dtype=dtype, device="meta") for dtype in (torch.float32, *[torch.float16] * 2))
    with Largest() as seen:
        add_product(total.new_empty(8, 4), left.new_empty(5, 8), right.new_empty(5, 4))
    assert [str(call) for call in seen.calls if "mm" in str(call)] == ["aten.addmm.dtype_out"]


@pytest.mark.parametrize(
    ("device_type", "gigabytes", "rows"), [("cpu", 900, 512), ("cuda", 16, 4096), ("cuda", 40, 8192), ("mps", 0, 4096)]
)
def test_rows_of_the_head_follow_from_the_device(device_type: str, gigabytes: int, rows: int) -> None:
    assert head_rows_for(device_type, gigabytes * 10**9) == rows
