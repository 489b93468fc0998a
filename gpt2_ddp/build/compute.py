"""What a run computes with: the model, the optimizer, and how gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gpt2_ddp.build.rules import optimizer_rule
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed import reduction as gradients
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.wrapping import wrap
from gpt2_ddp.metrics.log import warn
from gpt2_ddp.model import huggingface as pretrained
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.optim.updates import zero_gradients
from gpt2_ddp.system.allocator import keep_freed_memory
from gpt2_ddp.system.errors import OneRankError, UserError
from gpt2_ddp.system.hardware import Hardware
from gpt2_ddp.system.precision import Precision, choose_compile


def start_model(config: TrainConfig, context: DistContext, found: Found) -> tuple[GPT, torch.optim.Optimizer]:
    """The raw model and an optimizer over it, with the weights of a new run, the same on every rank; where a checkpoint
    was found they are undefined until it is restored.
    """
    if context.device.type == "cpu":
        keep_freed_memory()
    model = context.run_on_all(lambda: start_weights(config, found, context))
    if found.path is None:
        context.broadcast_tensors(dict(model.named_parameters()))
    model.activation_checkpointing = config.activation_checkpointing
    return model, optimizer_rule(config).make(model, context.device)


def start_weights(config: TrainConfig, found: Found, context: DistContext) -> GPT:
    """The model on its device, with the weights of a new run on rank 0; elsewhere they are undefined, and read from no
    disk, and so they are where a checkpoint was found.
    """
    model = GPT(model_config(config.model, dropout=config.dropout))
    if found.path or not context.is_main:
        return model.to_empty(device=context.device)
    if config.init_from is None:
        return model.init_weights(config.seed).to(context.device)
    source = pretrained.find_model(config.init_from)
    loaded = pretrained.load_model(source, vocab_size=model.config.vocab_size, dropout=config.dropout)
    if loaded.config != model.config:
        raise UserError(f"{source} is no {config.model}: it has {loaded.config}")
    return loaded.to(context.device)


def choose_numerics(
    config: TrainConfig,
    context: DistContext,
    plan: BatchPlan,
    hardware: Hardware,
    dtype: torch.dtype,
    found: Found,
) -> dict[str, object]:
    """What bits depend on beside the configuration, checked against every rank and the resumed run.

    Raises:
        UserError: where it differs, or the micro-batches and ranks make no full binary tree.
    """
    numerics: dict[str, object] = {
        "device": hardware.name,
        "dtype": str(dtype),
        "compile": compiles(config, hardware),
        "torch": torch.__version__,
        "micro_batch_size": plan.micro_batch_size,
        "activation_checkpointing": config.activation_checkpointing,
    }
    saved = (found.state.get("numerics") or {}) if found.path else None
    gradients.require_same_numerics(context.gather(numerics), saved)
    gradients.require_tree(plan.grad_accum_steps * context.world_size, context.world_size)
    return numerics


def compiles(config: TrainConfig, hardware: Hardware) -> bool:
    """Whether the training step of this run is compiled; the same at every start, on any number of ranks."""
    flops = model_config(config.model).flops_per_token(config.sequence_length)
    return choose_compile(config.compile, hardware, run_flops=flops * config.total_batch_size * config.max_steps)


def make_reduction(
    train_model: nn.Module, context: DistContext, plan: BatchPlan, *, reproducible: bool
) -> gradients.GradientReduction:
    """How the gradients of a step are summed: by DDP, or in the fixed tree of --reproducible."""
    kind = gradients.TreeReduction if reproducible else gradients.DDPReduction
    return kind(train_model, context, plan.grad_accum_steps)


def trainable(
    config: TrainConfig,
    context: DistContext,
    plan: BatchPlan,
    hardware: Hardware,
    precision: Precision,
    model: GPT,
) -> nn.Module:
    """`model` compiled where that works and wrapped by DDP, warmed up by backward passes that leave nothing behind.

    DDP orders its buckets anew after the first backward of a process. Were that a step of training, a resumed
    process would add the gradients of its first step in another order than the uninterrupted one did.

    Raises:
        UserError: where a micro-batch does not fit into a GPU's memory.
    """
    train_model: nn.Module = model
    if compiles(config, hardware):
        train_model = compiled_or_not(context, plan, precision, model)
    if config.reproducible or context.world_size == 1:
        return train_model
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs where buckets end, and a block is small enough
    wrapped = wrap(train_model, context)
    with fitting(plan):
        for _ in range(2):  # the buckets are ordered anew when the second pass begins
            model.zero_grad(set_to_none=True)  # else two sets of buckets, or a third of gradients, would live at once
            warm_up(wrapped, plan, precision, context.device)
    zero_gradients(model.parameters(), in_place=True)
    return wrapped


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
            "--micro-batch-size, or auto, or --activation-checkpointing"
        ) from error
