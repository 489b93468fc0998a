"""How fast this machine multiplies, measured: what `--dtype auto` goes by on a CPU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from gpt2_ddp.system.hardware import Hardware

MEASURED_ROWS, MEASURED_WIDTH = 256, 512
"""Rows of the linear layer that is measured, and its width where the model's is not less."""
MEASURED_SECONDS, MEASURED_ROUNDS = 0.04, 5
"""Both formats are measured in turn until so much time and so many rounds are over: where the machine is busy, a single
pass may take a hundred times as long as the next."""


@dataclass(frozen=True, kw_only=True)
class MatmulSpeed:
    """FLOP/s of a linear layer's forward pass on one thread, by number format."""

    float32: float
    bfloat16: float


def measure_speed(requested: str, hardware: Hardware, width: int) -> MatmulSpeed | None:
    """What `choose_dtype` has to know of this machine; None where it does not ask for it.

    One thread multiplies (256, width) by (width, 4 width) in each format. The fastest pass counts, since what else runs
    on the machine only makes a pass slower; several threads wait for each other in every pass, and where others keep
    the cores busy not one is fast. No random number is drawn.
    """
    if requested != "auto" or hardware.device_type != "cpu":
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(min(width, MEASURED_WIDTH))
    finally:
        torch.set_num_threads(threads)


def _measured(width: int) -> MatmulSpeed:
    x, weight = torch.ones(MEASURED_ROWS, width), torch.ones(4 * width, width)
    fastest = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    layers = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in fastest}
    for layer in layers.values():
        torch.nn.functional.linear(*layer)  # the first pass also prepares the kernel
    began, rounds = time.perf_counter(), 0
    while rounds < MEASURED_ROUNDS or time.perf_counter() - began < MEASURED_SECONDS:
        rounds += 1
        for dtype, layer in layers.items():
            start = time.perf_counter()
            torch.nn.functional.linear(*layer)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    flops = 2 * MEASURED_ROWS * width * 4 * width
    return MatmulSpeed(float32=flops / fastest[torch.float32], bfloat16=flops / fastest[torch.bfloat16])
