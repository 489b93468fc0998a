"""Whether a run is compiled, and the first passes of what is trained, in which compilers and memories fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.metrics.log import warn
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.optim.updates import zero_gradients
from gpt2_ddp.system.errors import OneRankError
from gpt2_ddp.system.hardware import Hardware
from gpt2_ddp.system.precision import Precision, choose_compile


def compiles(config: TrainConfig, hardware: Hardware) -> bool:
    """Whether the training step of this run is compiled; the same at every start, on any number of ranks."""
    flops = config.shape.flops_per_token(config.sequence_length)
    return choose_compile(config.compile, hardware, run_flops=flops * config.total_batch_size * config.max_steps)


def compiled_or_not(context: DistContext, plan: BatchPlan, precision: Precision, model: GPT) -> nn.Module:
    """`model` compiled, if that works on every rank; else itself, and each rank on which it failed says why."""
    compiled, reason = CompiledGPT(model), None
    if context.is_main:
        print("compiling the training step; the first time this takes a minute or more", flush=True)
    try:
        with fitting(plan):
            warm_up(compiled, plan, precision, context.device)
    except OneRankError:
        raise
    except Exception as error:  # a compiler fails in more ways than can be listed
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]  # its first line says that it has failed
        warn(f"torch.compile failed ({reason}): training without it")
    zero_gradients(model.parameters())
    return model if context.any(reason is not None) else compiled


def warm_up(module: nn.Module, plan: BatchPlan, precision: Precision, device: torch.device) -> None:
    """A forward and backward pass of one micro-batch as training gives it: a view of rows that are a token longer."""
    tokens = torch.zeros(plan.micro_batch_size, plan.sequence_length + 1, dtype=torch.int64, device=device)
    with precision.autocast():
        loss = module(tokens[:, :-1], tokens[:, 1:])
    loss.backward()


@contextmanager
def fitting(plan: BatchPlan) -> Iterator[None]:
    """Within it, a GPU that runs out of memory is the user's mistake.

    Raises:
        OneRankError: which says what to do; torchrun then ends the other ranks.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OneRankError(
            f"a micro-batch of {plan.micro_batch_size} sequences does not fit into the GPU's memory: take a smaller "
            "--micro-batch-size, or --activation-checkpointing; for a new run auto finds the largest"
        ) from error
