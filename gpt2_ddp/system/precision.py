"""Which number formats a run computes in, decided from what the hardware can do, on a CPU by measuring it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_ddp.system.hardware import Hardware
from gpt2_ddp.system.speed import MatmulSpeed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The formats of matmuls by name, those of the newest GPUs first."""

BFLOAT16_GAIN = 1.1
"""How many times as fast as float32 a CPU has to multiply bfloat16 for `auto` to take it. Its casts make the rest of a
step slower: in a profile of `gpt2-mini` (one core of an AMD EPYC with AVX2) matmuls and attention were 86% of a float32
step, other operations 14%, and in bfloat16 as much as 22% of a float32 step, so that the two formats meet at 1.11."""

COMPILE_FLOPS = 4e13
"""Floating-point operations of a run from which it is compiled on a CPU: about six minutes on two cores of an AMD EPYC
with AVX2, where two runs of `bench --auto` saw `gpt2-mini` begin 20 s later (7 s once the kernels were on the disk) and
train 1.11 and 1.02 times as fast in float32. Not known elsewhere: where bfloat16 is fast, compiling gains more and a
shorter run would earn it; where many cores do so much work in seconds, a longer one."""


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


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """What a matmul of `tensor` computes in here: autocast's dtype where that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def allow_tf32() -> None:
    """Let float32 matmuls use TF32, as every trainer of the field does on Ampere and later."""
    torch.set_float32_matmul_precision("high")
