"""The losses of small runs, kept as files, so that a change that means to change no number can show that it did not.

`python tests/golden.py` trains every case and compares; `--write` adds what this kind of processor computes, which
another kind does not to the last bit. `python tests/compare.py A B` does the same for two commits.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from running import ROOT, checkpoint, environment, metrics, sha256

FOLDER = ROOT / "tests" / "golden"
DATA = FOLDER / "data"
STEPS = 20
NEARLY = 1e-3
"""How far losses of 20 steps may lie apart on another kind of processor."""
COMMON = {
    "model": "gpt2-tiny",
    "device": "cpu",
    "compile": "off",
    "sequence-length": "64",
    "micro-batch-size": "4",
    "total-batch-size": "512",
    "max-steps": str(STEPS),
    "warmup-steps": "5",
    "max-lr": "1e-2",
    "val-every": "10",
    "checkpoint-every": "10",
    "keep-checkpoints": "0",
}
CASES = {
    "float32": ("--dtype=float32",),
    "bfloat16": ("--dtype=bfloat16",),
    "dropout": ("--dtype=float32", "--dropout=0.1", "--activation-checkpointing"),
    "reproducible": ("--dtype=float32", "--reproducible"),
}


def processor() -> str:
    """The kind of processor, and what else decides the last bit: the kernels that PyTorch takes, and its version."""
    fields = dict[str, str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    kind = [fields.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    version = torch.__version__.split("+")[0]
    return f"{platform.machine()} {' '.join(kind)} {torch.backends.cpu.get_cpu_capability()} torch {version}"


def flags(**changed: str) -> list[str]:
    """The trainer's flags that all cases share."""
    return [f"--{name}={value}" for name, value in (COMMON | changed).items()]


def argv(out_dir: Path, *more: str) -> list[str]:
    """All the trainer's flags."""
    return [*flags(), f"--data-dir={DATA}", f"--out-dir={out_dir}", *more]


def train(out_dir: Path, *more: str, root: Path = ROOT) -> None:
    """Train with the code at `root` to the end.

    Raises:
        RuntimeError: with what the trainer said, where it failed.
    """
    driver = root / "tests" / "drivers" / "trainer.py"
    command = [sys.executable, str(driver), *argv(out_dir, *more)]
    done = subprocess.run(
        command, env=environment({"PYTHONPATH": str(root)}), cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def told(out_dir: Path) -> dict[str, Any]:
    """What a run computed: every loss, and the SHA-256 of its last weights and moments."""
    return {
        "losses": [entry["loss"] for entry in metrics(out_dir)],
        "val_losses": [entry["val_loss"] for entry in metrics(out_dir, "val")],
        "data_hash": metrics(out_dir)[-1]["data_hash"],
        "model.safetensors": sha256(checkpoint(out_dir) / "model.safetensors"),
        "optimizer.safetensors": sha256(checkpoint(out_dir) / "optimizer.safetensors"),
    }


def computed(case: str, folder: Path, root: Path = ROOT) -> dict[str, Any]:
    """What the code at `root` makes of a case."""
    train(folder / case, *CASES[case], root=root)
    return told(folder / case)


def differences(expected: dict[str, Any], found: dict[str, Any], *, to_the_bit: bool) -> list[str]:
    """What differs, one phrase each: anything at all, or losses by more than `NEARLY`."""
    if to_the_bit:
        return [f"{name}: {found[name]} instead of {value}" for name, value in expected.items() if found[name] != value]
    return [
        f"{name}: {two} instead of {one}"
        for name in ("losses", "val_losses")
        for one, two in zip(expected[name], found[name], strict=True)
        if abs(one - two) > NEARLY
    ] + [f"{name}: another" for name in ("data_hash",) if expected[name] != found[name]]


def read(case: str) -> dict[str, dict[str, Any]]:
    """What is kept of a case, by the kind of processor."""
    file = FOLDER / f"{case}.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def compare(case: str, found: dict[str, Any]) -> list[str]:
    """How `found` differs from what is kept: to the bit where this kind of processor is known, else nearly."""
    kept = read(case)
    here = processor()
    if here in kept:
        return differences(kept[here], found, to_the_bit=True)
    return differences(next(iter(kept.values())), found, to_the_bit=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the losses of small runs with those kept in tests/golden")
    parser.add_argument("--write", action="store_true", help="keep what this kind of processor computes")
    write = parser.parse_args().write
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            found = computed(case, Path(folder))
            if write:
                kept = read(case) | {processor(): found}
                (FOLDER / f"{case}.json").write_text(json.dumps(kept, indent=1) + "\n")
            wrong = compare(case, found)
            failed |= bool(wrong)
            print(f"{case}: {'; '.join(wrong) if wrong else 'equal'} (loss {found['losses'][-1]:.6f})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
