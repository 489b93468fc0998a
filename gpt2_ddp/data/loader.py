"""The batches of one rank: of training, read ahead by a thread, and of validation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpt2_ddp.data.order import Indices
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.windows import Windows

PREFETCH = 2
"""Steps that are read ahead of the one being computed."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank computes in one step.

    `tokens` is int64 (grad_accum_steps, micro_batch_size, sequence_length + 1); `windows` (sequences_per_step,) are
    the window numbers of the whole step, of all ranks.
    """

    step: int
    windows: Indices
    tokens: Tensor

    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, each (micro_batch_size, sequence_length), of one micro-step after the other."""
        tokens = self.tokens.to(device, non_blocking=device.type == "cuda")  # elsewhere it is not pinned
        for micro_batch in tokens:
            yield micro_batch[:, :-1], micro_batch[:, 1:]


class TrainData:
    """The batches of one rank for its device, read ahead by a thread of its own, which ends with `close`."""

    def __init__(
        self, windows: Windows, plan: BatchPlan, *, rank: int, seed: int, device: torch.device, first_step: int
    ) -> None:
        self.windows, self.plan, self.rank, self.seed = windows, plan, rank, seed
        self.pin_memory = device.type == "cuda"
        self._next_step = first_step
        self._waited, self._given = 0.0, 0
        # a new thread's GPU is number 0, by way of which it would pin memory
        choose = partial(torch.cuda.set_device, device) if self.pin_memory else None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=choose)
        self._ahead: deque[Future[StepBatch]] = deque()

    def step_windows(self, step: int) -> Indices:
        """The windows (sequences_per_step,) that update `step`, counted from 1, consumes, of all ranks."""
        return self.windows.of_step(step, count=self.plan.sequences_per_step, seed=self.seed)

    def load(self, step: int) -> StepBatch:
        """This rank's batch of `step`, read now."""
        windows = self.step_windows(step)
        read = self.windows.read(windows[self.plan.rank_sequences(self.rank)])
        tokens = read.pin_memory() if self.pin_memory else read
        shape = (self.plan.grad_accum_steps, self.plan.micro_batch_size, self.plan.sequence_length + 1)
        return StepBatch(step=step, windows=windows, tokens=tokens.view(shape))

    def next(self) -> StepBatch:
        """The batch of the next step.

        Raises:
            OneRankError: where the data cannot be read, with the reason.
        """
        while len(self._ahead) <= PREFETCH:
            self._ahead.append(self._reader.submit(self.load, self._next_step))
            self._next_step += 1
        start = time.perf_counter()
        try:
            return self._ahead.popleft().result()
        finally:
            self._waited, self._given = self._waited + time.perf_counter() - start, self._given + 1

    def waited(self) -> tuple[float, int]:
        """Seconds that `next` has waited for the reader since the last call of this, and the batches it gave."""
        since, self._waited, self._given = (self._waited, self._given), 0.0, 0
        return since

    def seek(self, step: int) -> None:
        """Go on with the data of `step`; what was read ahead is dropped."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next_step = step

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """The first `val_tokens` of the validation shards in file order, divided over the ranks."""

    windows: Windows
    val_tokens: int
    micro_batch_size: int

    @property
    def sequences(self) -> int:
        return min(len(self.windows), self.val_tokens // self.windows.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens that one validation predicts, whatever the number of ranks."""
        return self.sequences * self.windows.sequence_length

    def batches(self, *, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (at most micro_batch_size, sequence_length) of this rank's share of the windows."""
        mine = np.array_split(np.arange(self.sequences, dtype=np.int64), world_size)[rank]
        for start in range(0, len(mine), self.micro_batch_size):
            tokens = self.windows.read(mine[start : start + self.micro_batch_size])
            yield tokens[:, :-1], tokens[:, 1:]
