"""How busy the machine is while it trains, told as an evaluation is: the event `system` of metrics.jsonl."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.system.usage import Usage


class MachineUse:
    """The `Usage` of the machine that rank 0 runs on, with the GPUs of the ranks there."""

    name: ClassVar[str] = "system"

    def __init__(self, every: int, out_dir: Path) -> None:
        self.every = every
        self._usage = Usage(out_dir)
        self._gpus_added = False

    def run(
        self,
        model: GPT,  # noqa: ARG002
        context: DistContext,
        autocast: AbstractContextManager[object],  # noqa: ARG002
        *,
        step: int,
    ) -> Findings | None:
        if not context.is_main:
            return None
        if context.device.type == "cuda" and not self._gpus_added:
            self._gpus_added = True
            self._usage.add_gpus([gpu_uuid(number) for number in range(context.local_world_size)])
        found = self._usage.read()
        line = ", ".join(f"{name} {value:g}" for name, value in found.items())
        return Findings(line=f"step {step} | system: {line}", values=found)


def gpu_uuid(number: int) -> str:
    """What NVML knows the CUDA device `number` by: it counts in another order, also GPUs that CUDA was not shown."""
    return f"GPU-{torch.cuda.get_device_properties(number).uuid}"
