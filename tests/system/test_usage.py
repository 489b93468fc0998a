"""How busy the machine is: psutil for real, and a stand-in for NVML, whose hardware is not here."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation import machine
from gpt2_ddp.evaluation.machine import MachineUse
from gpt2_ddp.system.usage import Usage

MACHINE = {"cpu_percent", "memory_free_mb", "memory_percent", "disk_free_mb", "disk_percent"}
GPU = {"gpu0_percent", "gpu0_memory_mb", "gpu0_celsius", "gpu0_watts"}


class Nvml:
    """Two GPUs as nvidia-ml-py tells of them; what is in `broken` raises its kind of error."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *broken: str) -> None:
        self.broken = broken

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.broken:
            raise self.NVMLError("Not Supported")
        return super().__getattribute__(name)

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return {"GPU-b": 1, "GPU-a": 0}[uuid]

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=97 - gpu, memory=5)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=80 << 30, used=(1 + gpu) << 30, free=0)

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 60 + gpu

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:  # noqa: N802
        return 300_250 + 1000 * gpu


def test_psutil_reads_what_the_system_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    usage, began = Usage(tmp_path), time.process_time()
    while time.process_time() < began + 0.1:
        pass
    found = usage.read()
    assert found.keys() == MACHINE
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(told[name].split()[0]) / 1024 for name in ("MemTotal", "MemAvailable"))
    assert found["memory_free_mb"] == pytest.approx(free, rel=0.2)
    assert found["memory_percent"] == pytest.approx(100 - 100 * free / total, abs=10)
    disk = shutil.disk_usage(tmp_path)
    assert found["disk_free_mb"] == pytest.approx(disk.free / 2**20, rel=0.1)
    assert found["disk_percent"] == pytest.approx(100 * disk.used / (disk.used + disk.free), abs=5)
    assert 0 < found["cpu_percent"] <= 100
    assert capfd.readouterr() == ("", "")


def test_a_reading_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(tmp_path / "gone")
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 1 / 0)
    assert usage.read().keys() == usage.read().keys() == {"memory_free_mb", "memory_percent"}
    said = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in said] == ["cpu_percent", "disk_free_mb", "disk_percent"]
    assert said[0] == "warning: --system-every: cpu_percent: division by zero; the run goes on without it"


def read_gpus(out_dir: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None) -> list[dict[str, float]]:
    """Two readings in a run of two ranks on a node with two GPUs, whose order is not NVML's."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(machine, "gpu_uuid", lambda number: ("GPU-b", "GPU-a")[number])
    use = MachineUse(5, out_dir)
    context = DistContext(world_size=2, local_world_size=2, device=torch.device("cuda", 0))
    found = [use.run(None, context, nullcontext(), step=step) for step in (5, 10)]
    assert found[1].line.startswith("step 10 | system: cpu_percent ")
    return [dict(each.values) for each in found]


def test_each_gpu_of_the_node_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for found in read_gpus(tmp_path, monkeypatch, Nvml()):
        assert {name: value for name, value in found.items() if name.startswith("gpu")} == {
            "gpu0_percent": 96, "gpu0_memory_mb": 2048, "gpu0_celsius": 61, "gpu0_watts": 301.2,
            "gpu1_percent": 97, "gpu1_memory_mb": 1024, "gpu1_celsius": 60, "gpu1_watts": 300.2,
        }  # fmt: skip
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("broken", "left", "said"),
    [
        ("nvmlDeviceGetPowerUsage", GPU - {"gpu0_watts"}, "gpu_watts: Not Supported"),
        ("nvmlDeviceGetHandleByUUID", set(), "GPU: Not Supported"),
        ("nvmlInit", set(), "GPUs: Not Supported"),
    ],
)
def test_what_a_gpu_does_not_tell_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    broken: str,
    left: set[str],
    said: str,
) -> None:
    for found in read_gpus(tmp_path, monkeypatch, Nvml(broken)):
        assert {name for name in found if name.startswith("gpu0")} == left
        assert found.keys() >= MACHINE
    assert capfd.readouterr().err == f"warning: --system-every: {said}; the run goes on without it\n"


def test_without_the_extra_gpus_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [found.keys() for found in read_gpus(tmp_path, monkeypatch, None)] == [MACHINE, MACHINE]
    said = 'warning: --system-every: GPUs are left out: pip install -e ".[gpu]" in the checkout\n'
    assert capfd.readouterr().err == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_nvidias_own_package_without_a_driver_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pynvml")
    usage = Usage(tmp_path)
    usage.add_gpus(["GPU-a"])
    assert usage.read().keys() == MACHINE
    assert capfd.readouterr().err.count("warning: --system-every: GPUs: ") == 1


def test_only_rank_0_reads(tmp_path: Path) -> None:
    use = MachineUse(1, tmp_path)
    assert use.run(None, DistContext(rank=1, world_size=2), nullcontext(), step=1) is None


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="--system-every -1 must be 0 or a positive number"):
        TrainConfig(system_every=-1)
