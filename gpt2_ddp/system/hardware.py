"""What a device is, and what its data sheet promises."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
from dataclasses import dataclass

import torch

from gpt2_ddp.system.cuda_build import require_kernels, require_used
from gpt2_ddp.system.errors import UserError

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


def choose_device(requested: str, *, local_rank: int, local_world_size: int) -> torch.device:
    """The device of one rank for `--device {auto,cuda,cpu,mps}`.

    Raises:
        UserError: where the device is not there, PyTorch cannot use a GPU that is, or the node runs more ranks than it
            has GPUs.
    """
    if requested in ("auto", "cuda") and not torch.cuda.is_available():
        require_used()
    if requested == "auto":
        alone = local_world_size == 1
        requested = (
            "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
        )
    if requested == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise UserError("--device cuda, but no CUDA GPU is visible: use --device cpu, or mend the driver")
        if local_world_size > gpus:
            raise UserError(
                f"{local_world_size} ranks on {socket.gethostname()}, which has {gpus} GPUs: "
                f"start {gpus} with --nproc_per_node={gpus}"
            )
        require_kernels(local_world_size)
        return torch.device("cuda", local_rank)
    if requested == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but this machine has no Metal GPU: use --device cpu")
    return torch.device(requested)
