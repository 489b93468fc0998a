"""How busy a machine is: processor, memory and disk by psutil, GPUs by NVIDIA's NVML (the package nvidia-ml-py)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from gpt2_ddp.system.cli import tell


class Usage:
    """Readings of this machine, each by its name. One that fails is left out, and its kind is told of once.

    `cpu_percent`: how busy all cores were since the reading before. `memory_free_mb`, in MiB, and `memory_percent`, in
    use: the machine's main memory. `disk_free_mb`, `disk_percent`: the file system that holds `directory`. Of GPU N:
    `gpuN_percent` of the last second or less in which it computed anything, `gpuN_memory_mb` in use, whoever uses it,
    `gpuN_celsius` and `gpuN_watts`.
    """

    def __init__(self, directory: Path) -> None:
        import psutil  # only a run with --system-every needs all of it

        self._told: set[str] = set()
        self._readings: dict[str, Callable[[], float]] = {
            "cpu_percent": lambda: psutil.cpu_percent(),
            "memory_free_mb": lambda: psutil.virtual_memory().available / 2**20,
            "memory_percent": lambda: psutil.virtual_memory().percent,
            "disk_free_mb": lambda: psutil.disk_usage(str(directory)).free / 2**20,
            "disk_percent": lambda: psutil.disk_usage(str(directory)).percent,
        }
        with contextlib.suppress(Exception):  # which the first reading will tell of
            psutil.cpu_percent()  # what the processor does is counted from here on

    def add_gpus(self, uuids: Sequence[str]) -> None:
        """From now on read the GPUs with these identities, numbered in this order, too."""
        try:
            import pynvml as nvml  # an extra

            nvml.nvmlInit()
        except ImportError:
            tell('warning: --system-every: GPUs are left out: pip install -e ".[gpu]" in the checkout')
        except Exception as error:  # of a driver that is not NVIDIA's, or another version
            self._tell("GPUs", error)
        else:
            for number, uuid in enumerate(uuids):
                self._add_gpu(nvml, number, uuid)

    def _add_gpu(self, nvml: ModuleType, number: int, uuid: str) -> None:
        try:
            gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:  # a slice of a GPU has another kind of identity
            self._tell("GPU", error)
            return
        self._readings |= {
            f"gpu{number}_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            f"gpu{number}_memory_mb": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20,
            f"gpu{number}_celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            f"gpu{number}_watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }

    def read(self) -> dict[str, float]:
        """All readings that succeed; never raises."""
        found = {}
        for name, reading in self._readings.items():
            try:
                found[name] = round(float(reading()), 1)
            except Exception as error:  # psutil's and NVML's own kinds: no number is worth the run
                self._tell(re.sub(r"\d", "", name), error)
        return found

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            said = " ".join(str(error).split()) or type(error).__name__
            tell(f"warning: --system-every: {what}: {said}; the run goes on without it")
