"""A GPU that this build of PyTorch cannot use is named, with the mend, and never left idle without a word."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, run, train_command

from gpt2_ddp.system.cuda_build import runs_on, why_no_kernels, why_unused
from gpt2_ddp.system.hardware import choose_device
from launch.discovery import find_unused_gpu

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU can be used")
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # PyTorch 2.11 on PyPI, Linux
CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (1, 20)]),
        ("compute_80", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("gfx90a", [], [(9, 0)]),
    ],
)
def test_what_a_card_can_run(architecture: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(runs_on(architecture, capability) for capability in runs)
    assert not any(runs_on(architecture, capability) for capability in does_not)


@pytest.mark.parametrize(
    ("name", "capability", "built_for", "mend"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA_13, "for CUDA 12.6 (pytorch.org, Get Started), or use --device cpu"),
        ("Tesla P100-PCIE-16GB", (6, 0), CUDA_13, "for CUDA 12.6 (pytorch.org, Get Started), or use --device cpu"),
        ("NVIDIA B200", (10, 0), CUDA_126, "install a newer PyTorch, or use --device cpu"),
        ("Tesla T4", (7, 5), CUDA_13, None),
        ("NVIDIA L4", (8, 9), CUDA_13, None),
        ("tomorrow's", (13, 0), CUDA_13, None),  # from the PTX
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA_126, None),
        ("AMD Instinct MI300X", (9, 4), ["gfx942"], None),
        ("unknown", (7, 0), [], None),
    ],
)
def test_a_card_without_kernels(name: str, capability: tuple[int, int], built_for: list[str], mend: str | None) -> None:
    why = why_no_kernels(name, capability, built_for, "2.11.0+cu130")
    assert (why is None) == (mend is None)
    if why and mend:
        major, minor = capability
        assert why.startswith(
            f"{name} has compute capability {major}.{minor}, and this PyTorch 2.11.0+cu130 is compiled"
        )
        assert " ".join(built_for) in why
        assert why.endswith(mend)


def test_any_card_of_the_node_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else only the rank of that card would tell, and only rank 0 is heard."""
    cards = [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index][1])
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"V100.* 7\.0"):
            choose_device("auto", local_rank=rank, local_world_size=2)
    assert choose_device("auto", local_rank=0, local_world_size=1) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("traces", "visible", "told"),
    [
        (["/dev/nvidia0"], None, True),
        (["nvidia-smi"], "0,1", True),
        (["nvidia-smi"], "GPU-1234", True),
        (["nvidia-smi"], "MIG-1234", True),
        ([], None, False),
        (["/dev/nvidia0"], "", False),  # hidden, as `python -m launch --cpu` does it
        (["/dev/nvidia0"], "-1", False),
        (["/dev/nvidia0"], "NoDevFiles", False),
    ],
)
def test_a_driver_without_a_gpu_is_told(traces: list[str], visible: str | None, told: bool) -> None:
    why = why_unused(traces, visible, "the driver is too old (found version 12020)")
    assert (why is not None) == told
    if why:
        assert traces[0] in why
        assert "the driver is too old (found version 12020)" in why


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH begins with a folder that has an `nvidia-smi`: a driver beside this PyTorch, which finds no GPU."""
    tool = tmp_path / "driver" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@NO_GPU
@pytest.mark.usefixtures("driver")
def test_the_trainer_does_not_fall_back_to_the_cpu_unasked(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(train_command(tmp_path / "run", data_dir, "--device=auto"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: an NVIDIA driver is here (")
    assert "nvidia-smi" in done.stderr
    assert f"PyTorch {torch.__version__}" in done.stderr
    assert done.stderr.endswith("or train on the CPU with --device cpu\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="NVIDIA driver is here"):
        choose_device("cuda", local_rank=0, local_world_size=1)
    assert choose_device("cpu", local_rank=0, local_world_size=1).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto", local_rank=0, local_world_size=1).type != "cuda"


@NO_GPU
@pytest.mark.usefixtures("driver")
def test_the_launcher_does_not_either() -> None:
    done = run([sys.executable, "-m", "launch", "--dry-run"], cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: an NVIDIA driver is here (")
    assert f"PyTorch {torch.__version__}" in done.stderr
    assert done.stderr.endswith("--device cpu among the trainer's flags, or launch's own --cpu\n")


def test_hidden_or_absent_gpus_are_no_fault(tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path)}
    if not Path("/dev/nvidia0").exists():
        assert find_unused_gpu(bare, "Found no NVIDIA driver") == ""
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "too old" in find_unused_gpu(bare, "too old")
    assert find_unused_gpu(bare | {"CUDA_VISIBLE_DEVICES": ""}, "No CUDA GPUs are available") == ""
