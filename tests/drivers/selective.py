"""What is computed again, by `run_block` and by PyTorch's selective checkpointing: `python -m drivers.selective`.

CPU time, since other processes make the time on the clock longer; the median of steps that take turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from drivers.live_bytes import LiveBytes
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.recomputation import run_block

CONFIG = GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=4096)
SAVED = {torch.ops.aten.addmm.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
STEPS = 15


def keep_products(_context: object, operation: object, *_arguments: object, **_options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def selective(block: nn.Module, x: Tensor, *more: Any, **_options: bool) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
    y: Tensor = checkpoint(block, x, *more, use_reentrant=False, context_fn=contexts)
    return y


def step(model: GPT, ids: Tensor, run: Callable[..., Tensor]) -> None:
    model.zero_grad()
    model.features(ids, run=run).square().mean().backward()


if __name__ == "__main__":
    trained, tokens = GPT(CONFIG).init_weights(0), torch.arange(4 * 256).view(4, 256)
    ways = {"run_block": run_block, "selective": selective}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(STEPS + 1):
        for name, way in ways.items():
            start = time.process_time()
            step(trained, tokens, way)
            seconds[name].append(time.process_time() - start)
    for name, way in ways.items():
        with LiveBytes() as live:
            step(trained, tokens, way)
        median = statistics.median(seconds[name][1:])
        print(f"{name}: {1000 * median:.0f} ms of CPU time a step, {live.peak / 2**20:.1f} MiB at the peak")
