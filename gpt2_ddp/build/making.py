"""Second phase of the start: what a run computes with is made, and takes up where a checkpoint stands."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gpt2_ddp.build.compiling import compiled_or_not, fitting, warm_up
from gpt2_ddp.build.rules import optimizer_rule
from gpt2_ddp.build.settling import Settled
from gpt2_ddp.checkpoint.state import Found, TrainState, restore
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.reduction import DDPReduction, GradientReduction, TreeReduction
from gpt2_ddp.distributed.wrapping import release, wrap
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.optim.updates import SkipCount, zero_gradients
from gpt2_ddp.system.allocator import keep_freed_memory
from gpt2_ddp.system.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Made:
    """`model` is the raw module; `train_model` is compiled and wrapped by DDP; both have the weights to begin with."""

    model: GPT
    train_model: nn.Module
    reduction: GradientReduction
    optimizer: torch.optim.Optimizer
    state: TrainState


def make(settled: Settled, context: DistContext, held: ExitStack) -> Made:
    """Make model, optimizer and state, alike on every rank; `held` takes DDP apart. Collective.

    Raises:
        UserError: where a checkpoint is not of this run's parts.
        OneRankError: where a micro-batch does not fit into a GPU's memory. (A compiler that fails is told, and left.)
    """
    config, plan, precision = settled.config, settled.plan, settled.precision
    model, optimizer = start_model(config, context, settled.found, settled.weights, precision.dtype)
    state = TrainState(
        skips=SkipCount(context.device),
        guard=SpikeGuard(config.spike_guard, config.spike_limit),
        scaler=precision.scaler,
    )
    restore(settled.found, context, state, model, optimizer)
    train_model: nn.Module = compiled_or_not(context, plan, precision, model) if settled.compiled else model
    if not config.reproducible:  # whose gradients are summed in a tree of their own
        train_model = wrapped_and_warm(train_model, context, plan, precision)
    held.callback(release, train_model)
    return Made(
        model=model,
        train_model=train_model,
        reduction=make_reduction(train_model, context, plan, reproducible=config.reproducible),
        optimizer=optimizer,
        state=state,
    )


def start_model(
    config: TrainConfig,
    context: DistContext,
    found: Found,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, torch.optim.Optimizer]:
    """The raw model and an optimizer over it, with the weights of a new run, the same on every rank; where a checkpoint
    was found they are undefined until it is restored.
    """
    if context.device.type == "cpu":
        keep_freed_memory()
    model = context.run_on_all(lambda: start_weights(config, found, weights, context))
    if found.path is None:
        context.broadcast_tensors(dict(model.named_parameters()))
    model.activation_checkpointing = config.activation_checkpointing
    return model, context.run_on_all(lambda: optimizer_rule(config).make(model, context, dtype))


def start_weights(config: TrainConfig, found: Found, weights: Path | None, context: DistContext) -> GPT:
    """The model on its device, with the weights of a new run on rank 0, drawn or those of the directory `weights`;
    elsewhere they are undefined, and read from no disk, and so they are where a checkpoint was found.
    """
    shape = config.shape
    if found.path or not context.is_main:
        return GPT(shape, device=context.device)
    if weights is None:
        return GPT(shape).init_weights(config.seed).to(context.device)
    return load_model(weights, vocab_size=shape.vocab_size, dropout=shape.dropout).to(context.device)


def wrapped_and_warm(model: nn.Module, context: DistContext, plan: BatchPlan, precision: Precision) -> nn.Module:
    """`model`, compiled or not, wrapped by DDP and warmed up by backward passes that leave nothing behind.

    DDP orders its buckets anew after the first backward of a process. Were that a step of training, a resumed
    process would add the gradients of its first step in another order than the uninterrupted one did.

    Raises:
        OneRankError: where a micro-batch does not fit into a GPU's memory.
    """
    if context.world_size == 1:
        return model
    wrapped = wrap(model, context)
    with fitting(plan):
        for _ in range(2):  # the buckets are ordered anew when the second pass begins
            model.zero_grad(set_to_none=True)  # else two sets of buckets, or a third of gradients, would live at once
            warm_up(wrapped, plan, precision, context.device)
    zero_gradients(model.parameters(), in_place=True)
    return wrapped


def make_reduction(
    train_model: nn.Module, context: DistContext, plan: BatchPlan, *, reproducible: bool
) -> GradientReduction:
    """How the gradients of a step are summed: by DDP, or in the fixed tree of --reproducible."""
    kind = TreeReduction if reproducible else DDPReduction
    return kind(train_model, context, plan.grad_accum_steps)
