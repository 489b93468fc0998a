"""Whether this build of PyTorch can use the NVIDIA GPUs that are here: a GPU is never left idle without a word."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gpt2_ddp.system.errors import UserError

DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"))
OLD_CARDS = "install PyTorch's build for CUDA 12.6 (pytorch.org, Get Started)"
"""The build for cards before Turing (compute capability 7.5), which those for CUDA 12.8 and 13 leave out from PyTorch
2.11 on (its RELEASE.md, CUDA support matrix; pytorch issue 172352). Address: pytorch.org/get-started/previous-versions.
"""


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for `architecture` (of `torch.cuda.get_arch_list()`) runs on a card of `capability`.

    Machine code, sm_80, runs on cards of the same major number and no smaller minor one; PTX, compute_80, on those and
    all later ones; with an `a` at its end on that very capability alone, with an `f` as machine code does (CUDA C++
    Programming Guide, "Application Compatibility" and "Family-Specific Features").
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if not found:
        return False
    kind, major, minor, feature = found[1], int(found[2]), int(found[3]), found[4]
    if feature == "a":
        return capability == (major, minor)
    if kind == "sm" or feature == "f":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


def why_no_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str], version: str) -> str | None:
    """Why PyTorch `version`, compiled for `architectures`, cannot compute on a card, and the mend; None where it can.

    Architectures that are not CUDA's, or none, say nothing.
    """
    ours = [each for each in architectures if each.startswith(("sm_", "compute_"))]
    if not ours or any(runs_on(each, capability) for each in ours):
        return None
    major, minor = capability
    mend = OLD_CARDS if capability < (7, 5) else "install a newer PyTorch"
    return (
        f"{name} has compute capability {major}.{minor}, and this PyTorch {version} is compiled for {' '.join(ours)}: "
        f"{mend}, or use --device cpu"
    )


def why_unused(traces: Sequence[str], visible: str | None, reason: str) -> str | None:
    """Why PyTorch does not see the GPU whose driver left `traces`; None where there are none, or where the user hid it.

    `visible` is CUDA_VISIBLE_DEVICES (None where it is not set), `reason` what PyTorch says.
    """
    if not traces or (visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip())):
        return None
    return (
        f"an NVIDIA driver is here ({', '.join(traces)}), but PyTorch finds no GPU: "
        f"{reason or 'torch.cuda.is_available() is False'}"
    )


def driver_traces(path: str | None = None) -> list[str]:
    """What of an NVIDIA driver is on this machine: its files, or `nvidia-smi` on PATH."""
    files = [str(file) for file in DRIVER_FILES if file.exists()]
    return files + ["nvidia-smi"] * (shutil.which("nvidia-smi", path=path) is not None)


def cuda_error() -> str:
    """PyTorch's own reason for not using CUDA; empty where it does, or says nothing."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # the first where it was built without CUDA
        return f"{' '.join(str(error).split())} (PyTorch {torch.__version__})"
    return ""


def require_used(environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        UserError: where a driver is here and no GPU can be used; called only where PyTorch finds none.
    """
    traces = driver_traces()
    if traces and (why := why_unused(traces, environment.get("CUDA_VISIBLE_DEVICES"), cuda_error())):
        raise UserError(f"{why}; mend that, or train on the CPU with --device cpu")


def require_kernels(gpus: int) -> None:
    """
    Raises:
        UserError: where this build has no code for one of the first `gpus` cards.
    """
    architectures = torch.cuda.get_arch_list()
    for index in range(gpus if architectures else 0):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if why := why_no_kernels(name, capability, architectures, torch.__version__):
            raise UserError(why)
