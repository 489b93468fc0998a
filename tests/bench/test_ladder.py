"""A rung of the ladder is computed as its name says, and what is told of it follows from its seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from gpt2_ddp.bench import command as bench
from gpt2_ddp.bench import ladder
from gpt2_ddp.bench.ladder import Rung, Shapes, WholeHead, measure
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import SIZES, GPTConfig

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=16)
SHAPES = Shapes(model="gpt2-nano", sequence_length=16, micro_batch_size=1, total_batch_size=32, steps=1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts what a rung calls; bfloat16 is what autocast takes here, and what is compiled stays as it is."""
    calls: Counter[str] = Counter()
    monkeypatch.setitem(SIZES, "gpt2-nano", TINY)
    monkeypatch.setattr(ladder, "VOCAB_SIZE", 500)

    def count(name: str, place: Any, attribute: str) -> None:
        original = getattr(place, attribute)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(place, attribute, counted)

    class AdamW(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__(groups, **options)
            calls["fused_optimizer"] = int(bool(self.defaults["fused"]))
            calls["vocabulary"] = max(len(p) for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch, "compile", lambda module, **_: calls.update(["compiled"]) or module)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(
        ladder, "choose_dtype", lambda asked, *_: (torch.bfloat16 if asked == "auto" else torch.float32, None)
    )
    count("explicit attention", ladder, "explicit_attention")
    count("PyTorch's attention", F, "scaled_dot_product_attention")
    count("whole head", WholeHead, "forward")
    count("kept_memory", ladder, "keep_freed_memory")
    count("tf32", ladder, "allow_tf32")
    hook = register_module_forward_pre_hook(lambda *_: calls.update(mixed=int(torch.is_autocast_enabled("cpu"))))
    yield calls
    hook.remove()


@pytest.mark.parametrize("rung", [*ladder.ladder(CPU), Rung(name="+ TF32", tf32=True)], ids=lambda rung: rung.name)
def test_a_rung_does_what_its_name_says(seen: Counter[str], rung: Rung) -> None:
    measure(SHAPES, rung, DistContext())
    for name in ("mixed", "compiled", "fused_optimizer", "kept_memory", "tf32"):
        assert bool(seen[name]) == getattr(rung, name), name
    assert seen["vocabulary"] == (512 if rung.padded_vocabulary else 500)
    assert bool(seen["explicit attention"]) == (not rung.fused_attention)
    assert bool(seen["PyTorch's attention"]) == (rung.fused_attention and not rung.block_attention)
    assert bool(seen["whole head"]) == (not rung.chunked_head)


def test_what_is_told_of_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four seconds for 32 tokens, on a device of 1 MFLOP/s."""
    monkeypatch.setitem(SIZES, "gpt2-nano", TINY)
    monkeypatch.setattr(ladder, "peak_flops", lambda *_: 1e6)
    told = ladder.summed_up(
        SHAPES, ladder.ladder(CPU)[3], 4.0, peak_memory=3 << 20, loss=9.5, dtype=torch.float32, device=CPU
    )
    flops = 6 * (2 * 12 * 16**2 + 512 * 16) + 12 * 2 * 16 * 16
    assert told == replace(told, ms_per_step=4000, tokens_per_sec=8, peak_memory_mb=3, mfu=round(8 * flops / 1e6, 4))


class Alone(DistContext):
    """Rank 0 of two, of which the other says the same."""

    def broadcast(self, value: Any) -> Any:
        return value

    def run_on_all(self, make: Any) -> Any:
        return make()


def test_how_a_step_scales(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank takes two seconds for its 32 tokens, two ranks beside each other two and a half: 80%."""
    monkeypatch.setattr(
        bench, "measure", lambda _shapes, _rung, context: ([2.0 if context.world_size == 1 else 2.5], None)
    )
    bench.show_scaling(SHAPES, Alone(world_size=2))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "1 rank: 16.0 tokens/s; 2 ranks: 25.6 tokens/s\nscaling efficiency 80.0%\n"
