"""Saves in the background: training goes on from a snapshot while a thread writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2_ddp.checkpoint.choice import prune
from gpt2_ddp.checkpoint.files import Content, Stamp, step_name, write_checkpoint

STILL_WRITING = "the save before it is still being written"


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How a save went: `seconds` from start to rename, `blocked_seconds` that training waited, bytes on disk."""

    step: int
    seconds: float
    blocked_seconds: float
    bytes: int
    error: str | None = None


class CheckpointWriter:
    """Saves in the background, on rank 0 only; every rank calls it alike.

    A save first copies every tensor, so training may go on at once; what went wrong is told by `reports`.
    """

    def __init__(
        self, directory: Path, *, keep: int, beside: int | None = None, enabled: bool, patience: float
    ) -> None:
        """The `keep` newest checkpoints stay, all where it is 0, and that of step `beside`.

        `patience` is how many seconds a save may wait for the one before it; then it is left out.
        """
        self.directory = directory
        self.patience = patience
        self.keep, self.beside = keep, beside
        self.enabled = enabled
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saves: list[Future[SaveReport]] = []
        self._verified: dict[Path, Stamp] = {}
        self.last_error: str | None = None
        """Why the last of the saves reported so far failed."""

    def save(self, step: int, files: Callable[[], Mapping[str, Content]], *, final: bool = False) -> None:
        """Start to save what `files` gives as the checkpoint of `step`, after the save before it has ended.

        A checkpoint of that step that is there already, because the run was resumed from it, stays as it is.
        """
        if not self.enabled or (self.directory / step_name(step)).exists():
            return
        start = time.perf_counter()
        if wait(self._saves, None if final else self.patience).not_done:
            report = SaveReport(step=step, seconds=0, blocked_seconds=self.patience, bytes=0, error=STILL_WRITING)
            self._saves.append(self._thread.submit(lambda: report))
            return
        snapshot = {name: _copy(content) for name, content in files().items()}
        blocked = time.perf_counter() - start
        self._saves.append(self._thread.submit(self._write, step, snapshot, blocked))

    def _write(self, step: int, files: Mapping[str, Content], blocked: float) -> SaveReport:
        start = time.perf_counter()
        try:
            size = write_checkpoint(self.directory / step_name(step), files, self._verified)
            if self.keep:
                prune(self.directory, self.keep, beside=self.beside, verified=self._verified)
        except OSError as error:
            seconds = time.perf_counter() - start
            return SaveReport(step=step, seconds=seconds, blocked_seconds=blocked, bytes=0, error=str(error))
        return SaveReport(step=step, seconds=time.perf_counter() - start, blocked_seconds=blocked, bytes=size)

    def is_busy(self, seconds: float) -> bool:
        """Whether a save has not ended in so many seconds from now."""
        return bool(wait(self._saves, seconds).not_done)

    def reports(self, *, wait: bool = False) -> list[SaveReport]:
        """The saves that ended since the last call; with `wait` all that were started."""
        ended = [save for save in self._saves if wait or save.done()]
        self._saves = [save for save in self._saves if save not in ended]
        reports = [save.result() for save in ended]
        if reports:
            self.last_error = reports[-1].error
        return reports

    def close(self) -> None:
        """Wait for a save in flight: it is finished, not torn."""
        self._thread.shutdown(wait=True)


def _copy(content: Content) -> Content:
    """`content` with its tensors copied to main memory one by one, each in the layout that it has.

    So a transposed view is copied as plainly as any other tensor, and it is the writer's thread that lays it out. The
    memory is not pinned: PyTorch would round each size up to a power of two and keep it pinned between the saves, up to
    twice the 12 bytes a parameter that a snapshot has (ATen/core/CachingHostAllocator.h).
    """
    if isinstance(content, bytes):
        return content
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
        if isinstance(value, Tensor)
        else value
        for key, value in content.items()
    }
