"""Which number formats a run computes in, decided from what the hardware can do, on a CPU by measuring it."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

PEAK_FLOPS: dict[str, tuple[float | None, float | None, float | None]] = {
    # teraFLOP/s of: bfloat16, float16, float32
    "V100 PCIe": (None, 112, 14),  # Tesla V100 data sheet
    "V100 SXM2": (None, 125, 15.7),
    "V100S": (None, 130, 16.4),  # Tesla V100S data sheet
    "T4": (None, 65, 8.1),  # T4 data sheet
    "A100": (312, 312, 156),  # A100 data sheet; SXM and PCIe alike
    "A30": (165, 165, 82),  # A30 data sheet
    "A10": (125, 125, 62.5),  # A10 data sheet
    "A10G": (70, 70, 35),  # A10G data sheet (Amazon's G5 instances)
    "A40": (149.7, 149.7, 74.8),  # A40 data sheet
    "RTX A6000": (154.8, 154.8, 77.4),  # GA102 white paper 2.0, appendix C
    "RTX 3090": (71, 71, 35.6),  # GA102 white paper 2.0, appendix A
    "L4": (121, 121, 60),  # L4 data sheet: half of what it has with sparsity
    "L40": (181.05, 181.05, 90.5),  # L40 data sheet
    "L40S": (362.05, 362.05, 183),  # L40S data sheet
    "RTX 6000 Ada": (364.2, 364.2, 182.1),  # Ada professional white paper, appendix
    "RTX 4090": (165.2, 165.2, 82.6),  # Ada white paper, appendix A
    "H100": (989, 989, 494),  # H100 data sheet, SXM: half of what it has with sparsity; so all of Hopper
    "H100 PCIe": (756, 756, 378),  # H100 PCIe data sheet
    "H100 NVL": (835, 835, 417),  # H100 data sheet, NVL
    "H200": (989, 989, 494),  # H200 data sheet, SXM
    "H200 NVL": (835, 835, 417),  # H200 data sheet, NVL
    "GH200": (989, 989, 494),  # GH200 data sheet
    "B100": (1750, 1750, None),  # HGX B100 data sheet, an eighth
    "B200": (2250, 2250, 1100),  # HGX B200 data sheet: a GPU, half of what it has with sparsity
    "GB200": (2500, 2500, 1250),  # GB200 NVL72 data sheet: as B200
    "RTX 5090": (209.5, 209.5, 104.8),  # RTX Blackwell white paper, appendix A
}
"""Dense peaks by what NVIDIA's documents call the card, of tensor cores that add up in float32 as PyTorch's matmuls do
(GeForce cards add up in float16 twice as fast); float32 is TF32 where there is TF32."""
PLAIN_WORDS = re.compile(r"nvidia|tesla|geforce|generation|gb|\d+gb?|hbm3e?|hbm2e?|sxm\d|pcie")
"""What a card's name may say beside that and be the same card, in lower case. With any other word (Laptop, Ti, D, MIG
1g.10gb, a virtual GPU's 8Q) it is another card, or a part of one."""

BFLOAT16_GAIN = 1.1
"""How many times as fast as float32 a CPU has to multiply bfloat16 for `auto` to take it. Its casts make the rest of a
step slower: in a profile of `gpt2-mini` (one core of an AMD EPYC with AVX2) matmuls and attention were 86% of a float32
step, other operations 14%, and in bfloat16 as much as 22% of a float32 step, so that the two formats meet at 1.11."""
MEASURED_ROWS, MEASURED_WIDTH = 256, 512
"""Rows of the linear layer that is measured, and its width where the model's is not less."""
MEASURED_SECONDS, MEASURED_ROUNDS = 0.04, 5
"""Both formats are measured in turn until so much time and so many rounds are over: where the machine is busy, a single
pass may take a hundred times as long as the next."""

COMPILE_FLOPS = 4e13
"""Floating-point operations of a run from which it is compiled on a CPU: about six minutes on two cores of an AMD EPYC
with AVX2, where two runs of `bench --auto` saw `gpt2-mini` begin 20 s later (7 s once the kernels were on the disk) and
train 1.11 and 1.02 times as fast in float32. Not known elsewhere: where bfloat16 is fast, compiling gains more and a
shorter run would earn it; where many cores do so much work in seconds, a longer one."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a device is, as far as precision asks.

    `capability` is CUDA's compute capability; `cpu_bf16` whether the CPU multiplies bfloat16 (AVX512-BF16 or AMX);
    `cpp_compiler` whether the C++ compiler is there that torch.compile calls on a CPU.
    """

    device_type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    cpu_bf16: bool = False
    cpp_compiler: bool = True


def found_hardware(device: torch.device) -> Hardware:
    """The `Hardware` of `device`."""
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return Hardware(device_type="cuda", name=name, capability=capability)
    if device.type == "cpu":
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        found = shutil.which(compiler) is not None
        return Hardware(device_type="cpu", name=name, cpu_bf16=_cpu_has_bf16(), cpp_compiler=found)
    return Hardware(device_type=device.type)


def _cpu_has_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # public from torch 2.13 on
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return any(bool(getattr(torch.cpu, f"_is_{part}_supported", bool)()) for part in ("avx512_bf16", "amx_tile"))


@dataclass(frozen=True, kw_only=True)
class MatmulSpeed:
    """FLOP/s of a linear layer's forward pass, by number format."""

    float32: float
    bfloat16: float


def measure_speed(requested: str, hardware: Hardware, width: int) -> MatmulSpeed | None:
    """What `choose_dtype` has to know of this machine; None where it does not ask for it.

    This process, with its threads, multiplies (256, width) by (width, 4 width) in each format. The fastest pass counts,
    since what else runs on the machine only makes a pass slower. No random number is drawn.
    """
    if requested != "auto" or hardware.device_type != "cpu":
        return None
    width = min(width, MEASURED_WIDTH)
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


def choose_dtype(
    requested: str, hardware: Hardware, speed: MatmulSpeed | None = None
) -> tuple[torch.dtype, str | None]:
    """The dtype of matmuls for `--dtype {auto,bfloat16,float16,float32}`, and what is to be said of it or None.

    On CUDA `auto` asks the compute capability: `torch.cuda.is_bf16_supported()` also counts emulation, which crawls on
    a T4. On a CPU a capability is no promise of speed, so that `speed` decides; without it, float32.
    """
    native_bf16 = hardware.cpu_bf16 or (hardware.capability or (0, 0)) >= (8, 0)
    tensor_cores = hardware.capability is not None and hardware.capability >= (7, 0)
    if requested == "auto" and hardware.device_type == "cpu":
        return _faster_dtype(speed) if speed else (torch.float32, None)
    if requested == "auto":
        return torch.bfloat16 if native_bf16 else torch.float16 if tensor_cores else torch.float32, None
    if requested == "bfloat16" and not native_bf16 and hardware.device_type in ("cuda", "cpu"):
        faster = "float16" if tensor_cores else "float32"
        where = hardware.name or hardware.device_type
        return torch.bfloat16, f"{where} only emulates bfloat16; --dtype {faster} is faster here"
    return DTYPES[requested], None


def _faster_dtype(speed: MatmulSpeed) -> tuple[torch.dtype, str]:
    """The dtype for a CPU that multiplies at `speed`, and why."""
    if speed.bfloat16 > BFLOAT16_GAIN * speed.float32:
        dtype, taken, left = torch.bfloat16, speed.bfloat16, f"{speed.float32 / 1e12:.2g} in float32"
    else:
        dtype, taken, left = torch.float32, speed.float32, f"{speed.bfloat16 / 1e12:.2g} in bfloat16"
    return dtype, f"dtype: {dtype_name(dtype)} by measurement: {taken / 1e12:.2g} TFLOP/s against {left}"


def dtype_name(dtype: torch.dtype) -> str:
    """As `--dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def choose_compile(requested: str, hardware: Hardware, *, run_flops: float) -> bool:
    """Whether to compile the training step for `--compile {auto,on,off}`.

    auto does on the GPUs that Triton knows, and on a CPU with a compiler for a run that is long enough to earn the
    compilation back.
    """
    if requested != "auto":
        return requested == "on"
    if hardware.device_type == "cpu":
        return hardware.cpp_compiler and run_flops > COMPILE_FLOPS
    return (hardware.capability or (0, 0)) >= (7, 0)


def peak_flops(hardware: Hardware, dtype: torch.dtype) -> float | None:
    """The device's dense peak in FLOP/s at `dtype`, None where the table does not know it, or for a slice of a GPU."""
    words = hardware.name.lower().replace("-", " ").split()
    for card, peaks in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
        named = card.lower().split()
        if set(named) <= set(words):
            if not all(word in named or PLAIN_WORDS.fullmatch(word) for word in words):
                return None
            peak = peaks[(torch.bfloat16, torch.float16, torch.float32).index(dtype)]
            return peak * 1e12 if peak else None
    return None


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtype policy of a run: float32 weights, matmuls in `dtype`, and a scaler that is a no-op but for float16."""

    dtype: torch.dtype
    device_type: str
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Precision:
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        return cls(dtype=dtype, device_type=device.type, scaler=scaler)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward passes, in training and evaluation alike."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


def allow_tf32() -> None:
    """Let float32 matmuls use TF32, as every trainer of the field does on Ampere and later."""
    torch.set_float32_matmul_precision("high")


def attention_backends(device: torch.device) -> list[SDPBackend] | None:
    """What attention outside of training may be computed by; None where PyTorch's own choice is right.

    From torch 2.11 on PyTorch prefers cuDNN on Hopper and later, which plans anew for each shape it meets, and a sample
    has another length at every token.
    """
    if device.type != "cuda":
        return None
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The context of a model's forward passes outside of training: no dropout, no gradients, and shapes that change
    from call to call. The model is left in the mode it was in."""
    backends = attention_backends(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if backends is None else sdpa_kernel(backends):
            yield
    finally:
        model.train(training)
