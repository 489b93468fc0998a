"""GPUs on paper: `python -m gpt2_ddp.bench.gpus` prints what the arithmetic says of the usual ones.

docs/gpus.md is its output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from gpt2_ddp.model.gpt import SIZES, GPTConfig
from gpt2_ddp.model.head import LARGE_HEAD_ROWS, LARGE_MEMORY
from gpt2_ddp.model.memory import USABLE, TrainingMemory, fits_into, training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim.rule import AdamW
from gpt2_ddp.system import cli
from gpt2_ddp.system.hardware import Hardware, peak_flops
from gpt2_ddp.system.precision import choose_dtype


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its data sheet has it; `memory` in bytes."""

    hardware: Hardware
    memory: int

    @property
    def dtype(self) -> torch.dtype:
        """What `--dtype auto` takes there."""
        return choose_dtype("auto", self.hardware)[0]


CARDS = tuple(
    Card(hardware=Hardware(device_type="cuda", name=f"{name} {size}GB", capability=capability), memory=size * 10**9)
    for name, size, capability in (("T4", 16, (7, 5)), ("A100", 40, (8, 0)), ("A100", 80, (8, 0)), ("H100", 80, (9, 0)))
)
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PAGE = """\
# GPUs, on paper

Printed by `python -m gpt2_ddp.bench.gpus`. Nothing here was measured on a GPU: it is the arithmetic by which the
trainer reckons its `mfu` and what fits, which the tests compare with counted operations and measured memory on a CPU.

For {length} tokens a sequence, float32 weights, AdamW, and matmuls in the two-byte format that `--dtype auto` takes.
GB are 10^9 bytes, GiB 2^30.

## Operations and traffic

GFLOP a token: forward and backward, matmuls only, attention in full. All-reduce: the gradients that DDP sums once a
step, whatever the micro-batch; in a ring of n GPUs each one sends and receives 2 (n - 1) / n times as much. AdamW: what
it reads (weights, gradients, two moments) and writes (weights, two moments) once a step.

{work}

## Memory of one GPU by micro-batch, GiB

Fixed: weights, gradients, moments, and the weights in the dtype of the matmuls. The rest grows with the micro-batch.
Counted is what PyTorch keeps when the blocks are compiled, on one GPU or under DDP, with {rows} rows of the head at a
time, as on a card of 40 GB or more; the CUDA context and the allocator's unused parts come on top.

{memory}

## The largest power of two that fits

Up to {most}, into {usable} of the memory on the card's data sheet; in brackets with `--activation-checkpointing`. A
dash: not one sequence fits. Peak: what `mfu` is a share of, dense matmuls in that format by the data sheet.

{fitting}
"""


def gpu_page(sequence_length: int = 1024) -> str:
    """What GPT-2 needs of the usual GPUs, on paper, for sequences of that many tokens: the page docs/gpus.md."""
    length = sequence_length
    return PAGE.format(
        length=length,
        usable=f"{USABLE['cuda']:.0%}",
        most=MICRO_BATCHES[-1],
        rows=LARGE_HEAD_ROWS,
        work=table(
            ["", "parameters", "GFLOP a token", "all-reduce, GB", "AdamW, GB"],
            ([name, *work(SIZES[name], length)] for name in PUBLISHED),
        ),
        memory=table(
            ["", "fixed", *map(str, MICRO_BATCHES)],
            ([name, *by_micro_batch(SIZES[name], length)] for name in PUBLISHED),
        ),
        fitting=table(
            ["", "dtype", "peak, TFLOP/s", *PUBLISHED],
            (card_row(card, length) for card in CARDS),
        ),
    )


def reckon(config: GPTConfig, **values: Any) -> TrainingMemory:
    """What training takes on a GPU, compiled, with AdamW."""
    return training_memory(config, device_type="cuda", state_bytes=state_bytes(config), compiled=True, **values)


@lru_cache
def state_bytes(config: GPTConfig) -> int:
    """What AdamW's state takes."""
    return AdamW(weight_decay=0.1, beta1=0.9, beta2=0.95).state_bytes(config)


def work(config: GPTConfig, length: int) -> list[str]:
    """Parameters, GFLOP for a token, and GB that gradients and optimizer move in a step."""
    needed = on_gpu(config, 1, length)
    updated = needed.weights + needed.moments
    moved = [needed.gradients, updated + needed.gradients + updated]
    flops = config.flops_per_token(length)
    return [f"{parameter_count(config):,}", f"{flops / 1e9:.2f}", *(f"{size / 1e9:.1f}" for size in moved)]


def by_micro_batch(config: GPTConfig, length: int) -> list[str]:
    """GiB without activations, and in all with each of `MICRO_BATCHES`."""
    needed = [on_gpu(config, size, length) for size in MICRO_BATCHES]
    return [f"{size / 2**30:.1f}" for size in (needed[0].fixed, *(each.total for each in needed))]


def on_gpu(config: GPTConfig, size: int, length: int) -> TrainingMemory:
    """What a micro-batch of `size` sequences needs with matmuls in two bytes."""
    return reckon(
        config, micro_batch_size=size, sequence_length=length, dtype=torch.float16, device_memory=LARGE_MEMORY
    )


def card_row(card: Card, length: int) -> list[str]:
    """Name, dtype, peak, and the largest of `MICRO_BATCHES` that fits for each size, without and with checkpointing."""
    peak = peak_flops(card.hardware, card.dtype)
    row = [card.hardware.name, str(card.dtype).removeprefix("torch."), f"{peak / 1e12:g}" if peak else "-"]
    for name in PUBLISHED:
        plain, checkpointing = (
            max(
                filter(
                    fits_into(
                        card.memory,
                        "cuda",
                        partial(
                            reckon,
                            SIZES[name],
                            sequence_length=length,
                            dtype=card.dtype,
                            device_memory=card.memory,
                            activation_checkpointing=again,
                        ),
                    ),
                    MICRO_BATCHES,
                ),
                default="-",
            )
            for again in (False, True)
        )
        row.append(f"{plain} ({checkpointing})")
    return row


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    cli.run(
        lambda: print(cli.parse(gpu_page, "What GPT-2 needs of the usual GPUs, on paper"), end=""), prints_result=True
    )
