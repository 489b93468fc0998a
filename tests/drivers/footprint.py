"""A small training; as a command, `python -m drivers.footprint DTYPE`, which share of its memory is reckoned."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.wrapping import grad_sync
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.memory import training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim.rule import AdamW
from gpt2_ddp.optim.updates import apply_update, zero_gradients
from gpt2_ddp.system.allocator import keep_freed_memory
from gpt2_ddp.system.precision import Precision

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=256, vocab_size=4096)
LENGTH = 256


def train(
    config: GPTConfig,
    dtype: torch.dtype,
    batch: int,
    *,
    compiled: bool = False,
    ddp: bool = False,
    checkpointing: bool = False,
) -> None:
    """Two steps of two micro-steps each; with `ddp` in the process group that there is."""
    precision, ids = Precision.of(dtype, torch.device("cpu")), torch.zeros(batch, LENGTH, dtype=torch.int64)
    model = GPT(config).init_weights(0)
    model.activation_checkpointing = checkpointing
    optimizer = AdamW(weight_decay=0.1, beta1=0.9, beta2=0.95).make(model, DistContext())
    train_model: nn.Module = CompiledGPT(model) if compiled else model
    if ddp:  # as `compute.trainable` does: compiled before, since DDP would have graphs cut where its buckets end
        with precision.autocast():
            train_model(ids, ids).backward()
        train_model = DistributedDataParallel(train_model, gradient_as_bucket_view=True)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            with precision.autocast():
                train_model(ids, ids).backward()
        zero_gradients(model.parameters(), in_place=True)
    for _ in range(2):
        for last in (False, True):
            with grad_sync(train_model, sync=last), precision.autocast():
                loss = train_model(ids, ids)
                loss.backward()
        apply_update(optimizer, precision.scaler, loss=loss, grad_clip=1.0, zero_in_place=ddp)


def resident(name: str) -> int:
    """Bytes of this process in main memory: now (`VmRSS:`), or at the peak (`VmHWM:`)."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(name)[2].split()[0])


if __name__ == "__main__":
    chosen, size = getattr(torch, sys.argv[1]), 12
    keep_freed_memory()  # as the trainer does
    train(replace(CONFIG, n_layer=1), chosen, 1)  # what the first use of each kernel takes is not the model's
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS:")
    train(CONFIG, chosen, size)
    reckoned = training_memory(
        CONFIG,
        micro_batch_size=size,
        sequence_length=LENGTH,
        dtype=chosen,
        device_type="cpu",
        state_bytes=8 * parameter_count(CONFIG),
    )
    print(reckoned.total / (resident("VmHWM:") - before))
