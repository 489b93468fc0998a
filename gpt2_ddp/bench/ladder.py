"""The rungs of the speed ladder: how a step can be computed, from a float32 baseline to what training does."""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.wrapping import grad_sync, wrap
from gpt2_ddp.model.block_attention import BlockAttention
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT, GPTConfig, model_config
from gpt2_ddp.model.vocabulary import VOCAB_SIZE
from gpt2_ddp.optim.rule import AdamW, parameter_groups
from gpt2_ddp.optim.updates import apply_update
from gpt2_ddp.system.allocator import find_tcmalloc, keep_freed_memory
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.hardware import found_hardware, peak_flops
from gpt2_ddp.system.precision import Precision, allow_tf32, choose_dtype
from gpt2_ddp.system.speed import measure_speed

LEARNING_RATE = 6e-4


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is computed, and how often."""

    model: str
    sequence_length: int
    micro_batch_size: int
    """Sequences computed at once."""
    total_batch_size: int
    """Tokens in a step on each rank."""
    steps: int
    """Timed steps a round, after one that is not timed."""

    def __post_init__(self) -> None:
        tokens = self.micro_batch_size * self.sequence_length
        if min(tokens, self.steps) < 1 or self.total_batch_size % max(tokens, 1):
            raise UserError(
                f"--total-batch-size {self.total_batch_size} must be a multiple of the {tokens} tokens of a "
                "micro-batch, and --steps at least 1"
            )
        if self.sequence_length > model_config(self.model).block_size:
            raise UserError(f"--sequence-length {self.sequence_length} is past the model's block size")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How a step is computed; each rung of the ladder changes one thing of the one before."""

    name: str
    tf32: bool = False
    mixed: bool = False
    fused_attention: bool = False
    padded_vocabulary: bool = False
    compiled: bool = False
    fused_optimizer: bool = False
    chunked_head: bool = False
    block_attention: bool = False
    """Where training takes it, which is in bfloat16 on a CPU."""
    only_blocks: bool = False
    """In blocks whatever the dtype."""
    kept_memory: bool = False
    """The process keeps what it frees, and moments and gradients come before all else, as in training."""
    tcmalloc: bool = False
    """For whoever starts the process: it has to be preloaded."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rung's numbers. `speedup` is the first rung's time over this one's; `loss` that of the first
    micro-batch."""

    name: str
    ms_per_step: float
    tokens_per_sec: float
    speedup: float
    peak_memory_mb: float
    mfu: float | None
    loss: float


def ladder(device: torch.device) -> list[Rung]:
    """The rungs that this kind of device has."""
    changes: list[tuple[str, str]] = [
        ("autocast", "mixed"),
        ("fused attention", "fused_attention"),
        ("padded vocabulary", "padded_vocabulary"),
        ("torch.compile", "compiled"),
        ("fused AdamW", "fused_optimizer"),
        ("head in chunks", "chunked_head"),
    ]
    if device.type == "cuda":
        changes.insert(0, ("TF32", "tf32"))
    if device.type == "cpu":
        changes += [("attention in blocks", "block_attention"), ("memory kept", "kept_memory")]
        changes += [("tcmalloc", "tcmalloc")] if find_tcmalloc() else []
    rungs = [Rung(name="float32")]
    for name, field in changes:
        rungs.append(replace(rungs[-1], name=f"+ {name}", **{field: True}))
    return rungs


def attention_rungs() -> list[Rung]:
    """The two kinds of attention, in a step that is otherwise that of training in eager mode."""
    as_in_training = Rung(
        name="PyTorch's", mixed=True, fused_attention=True, padded_vocabulary=True, fused_optimizer=True,
        chunked_head=True, kept_memory=True,
    )  # fmt: skip
    return [as_in_training, replace(as_in_training, name="in blocks", block_attention=True, only_blocks=True)]


def first_rung_sequences(config: GPTConfig, sequence_length: int, memory: int) -> int:
    """Sequences of a micro-batch for CUDA: 16, which keep an A100 busy, or the power of two that the first rung fits.

    That rung keeps each layer's attention weights and about 17 vectors of n_embd a position, and four times the logits,
    all in float32; weights, gradients and moments are 16 bytes a parameter.
    """
    attention = config.n_layer * (config.n_head * sequence_length + 17 * config.n_embd)
    each = 4 * sequence_length * (attention + 4 * config.vocab_size)
    parameters = config.vocab_size * config.n_embd + 12 * config.n_layer * config.n_embd**2
    return next((size for size in (16, 8, 4, 2) if size * each + 16 * parameters < 0.9 * memory), 1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Attention with its matrix of weights written out, (B, n_head, T, T)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """PyTorch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def block_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """In blocks, in any dtype."""
    y: Tensor = BlockAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y


class WholeHead(GPT):
    """All logits at once, (B, T, vocab_size), and in float32 for the loss."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        return F.cross_entropy(self.logits(self.features(ids)).float().flatten(0, 1), targets.flatten())


def rung_config(shapes: Shapes, rung: Rung) -> GPTConfig:
    return replace(model_config(shapes.model), **({} if rung.padded_vocabulary else {"vocab_size": VOCAB_SIZE}))


def rung_model(shapes: Shapes, rung: Rung) -> GPT:
    """The model of a rung; all have the same weights, so that their losses can be compared."""
    config = rung_config(shapes, rung)
    weights = GPT(model_config(shapes.model)).init_weights(0).state_dict()
    model = (GPT if rung.chunked_head else WholeHead)(config)
    model.load_state_dict(weights | {"wte.weight": weights["wte.weight"][: config.vocab_size]})
    if rung.only_blocks or not rung.block_attention:
        plain = fused_attention if rung.fused_attention else explicit_attention
        for block in model.h:
            block.attn.attend = block_attention if rung.only_blocks else plain  # type: ignore[union-attr]
    return model


def measure(shapes: Shapes, rung: Rung, context: DistContext) -> tuple[list[float], Measured]:
    """The seconds of each timed step, and the rung's numbers without a `speedup`."""
    device = context.device
    if rung.tf32:
        allow_tf32()
    if rung.kept_memory:
        keep_freed_memory()
    requested, hardware = "auto" if rung.mixed else "float32", found_hardware(device)
    speed = context.run_on_main(lambda: measure_speed(requested, hardware, model_config(shapes.model).n_embd))
    dtype = choose_dtype(requested, hardware, speed)[0]
    precision = Precision.of(dtype, device)
    model = rung_model(shapes, rung).to(device)
    train_model: nn.Module = model
    if rung.compiled:
        train_model = CompiledGPT(model) if rung.chunked_head else torch.compile(model)  # type: ignore[assignment]
    train_model = wrap(train_model, context)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=LEARNING_RATE, fused=rung.fused_optimizer)
    if rung.kept_memory:
        AdamW(weight_decay=0.1, beta1=0.9, beta2=0.999).allocate_state(optimizer)
    shape = (-1, shapes.micro_batch_size, shapes.sequence_length)
    generator = torch.Generator().manual_seed(context.rank)
    tokens = torch.randint(VOCAB_SIZE, (shapes.total_batch_size,), generator=generator).view(shape).to(device)
    seconds, losses = list[float](), list[float]()
    for batch in (tokens[:1], *[tokens] * shapes.steps):
        start = time.perf_counter()
        losses.append(float(step(train_model, optimizer, precision, batch)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return seconds[1:], summed_up(shapes, rung, median, peak_memory=peak, loss=losses[0], dtype=dtype, device=device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, tokens: Tensor) -> Tensor:
    """One update on `tokens` (micro-steps, B, T), each predicting itself shifted by one; the mean loss."""
    total = torch.zeros((), device=tokens.device)
    for number, ids in enumerate(tokens, start=1):
        with grad_sync(model, sync=number == len(tokens)):
            with precision.autocast():
                loss = model(ids, ids.roll(-1, dims=1)) / len(tokens)
            precision.scaler.scale(loss).backward()
        total += loss.detach()
    if optimizer.defaults["fused"]:
        in_place = isinstance(model, DistributedDataParallel)
        apply_update(optimizer, precision.scaler, loss=total, grad_clip=1.0, zero_in_place=in_place)
    else:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return total


def peak_resident() -> int:
    """The most main memory that this process has held, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summed_up(
    shapes: Shapes,
    rung: Rung,
    seconds: float,
    *,
    peak_memory: int,
    loss: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Measured:
    rate = shapes.total_batch_size / seconds
    peak = peak_flops(found_hardware(device), dtype)
    flops = rung_config(shapes, rung).flops_per_token(shapes.sequence_length)
    return Measured(
        name=rung.name,
        ms_per_step=round(seconds * 1000, 2),
        tokens_per_sec=round(rate, 2),
        speedup=1.0,
        peak_memory_mb=round(peak_memory / 2**20, 1),
        mfu=round(rate * flops / peak, 4) if peak else None,
        loss=loss,
    )
