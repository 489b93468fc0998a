"""`Run`: everything that the training loop works with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gpt2_ddp.checkpoint.state import TrainState
from gpt2_ddp.checkpoint.writer import CheckpointWriter
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import TrainData
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.tokenizer import SavedTokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.reduction import GradientReduction
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.distributed.watchdog import Watchdog
from gpt2_ddp.evaluation.interface import Evaluation
from gpt2_ddp.metrics.log import RunLog
from gpt2_ddp.metrics.profiling import StepProfiler
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.optim.schedules import Schedule
from gpt2_ddp.system.hardware import Hardware
from gpt2_ddp.system.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop works with. `model` is the raw module; `train_model` is compiled and wrapped by DDP."""

    config: TrainConfig
    context: DistContext
    hardware: Hardware
    precision: Precision
    plan: BatchPlan
    model: GPT
    train_model: nn.Module
    reduction: GradientReduction
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    numerics: dict[str, object] | None
    data: TrainData
    data_fingerprint: str
    evaluations: tuple[Evaluation, ...]
    log: RunLog
    profiler: StepProfiler
    writer: CheckpointWriter
    stop: StopRequest
    watchdog: Watchdog
    state: TrainState
    tokenizer: SavedTokenizer | None

    def close(self) -> None:
        """End the threads and files of the run; a save in flight is finished first, and the others see that we live."""
        self.watchdog.stand_by()
        self.data.close()
        self.writer.close()
        self.watchdog.dismiss()
        self.profiler.end(self.log.say)
        self.log.close()
