"""Other places that show a run's numbers, TensorBoard and Weights & Biases: wanted, and never worth the run."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from gpt2_ddp.system.cli import GIVEN_UP, tell
from gpt2_ddp.system.errors import UserError

QUEUE_LENGTH = 10_000
"""Events that a slow board may be behind; it misses those after."""
CLOSING_SECONDS = 30.0
"""How long a board may take at the end to show what it has been given."""


class Board(Protocol):
    """Another place that shows a run's numbers."""

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes for TensorBoard into the folder `tensorboard` of the run directory."""

    def __init__(self, out_dir: Path, *, resumed_step: int) -> None:
        """
        Raises:
            ImportError: where the package is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

        self._writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=resumed_step + 1)

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{name}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends to Weights & Biases, project gpt2_ddp, under the name of the run directory; a resumed run goes on there."""

    def __init__(self, out_dir: Path) -> None:
        """
        Raises:
            ImportError: where the package is not installed; else whatever wandb raises, without a key for instance.
        """
        import wandb  # slow to import, and an extra

        name = out_dir.resolve().name
        identity = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:12]
        self._run = wandb.init(project="gpt2_ddp", name=name, id=identity, resume="allow", dir=str(out_dir))
        self._run.define_metric("*", step_metric="step")

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"{name}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        self._run.finish()


class Aside:
    """A board behind a thread: training never waits for it, and one that fails or does not answer is told of once."""

    def __init__(self, flag: str, make: Callable[[], Board], mend: str) -> None:
        """`flag` asks for the board, `mend` is what helps where it cannot be opened.

        Raises:
            UserError: where it cannot be opened: the user's mistake, or a service that is not there.
        """
        self._flag = flag
        try:
            self._board = make()
        except Exception as error:  # a library's own kinds
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            extra = f'; pip install "gpt2_ddp[{flag.strip("-")}]"' if isinstance(error, ImportError) else f"; {mend}"
            raise UserError(f"{flag}: {said}{extra}") from error
        self._events: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(QUEUE_LENGTH)
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._show, name=flag, daemon=True)
        self._thread.start()

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if self._failed.is_set():
            return
        try:
            self._events.put_nowait((name, step, dict(values)))
        except queue.Full:
            self._give_up("does not answer")

    def close(self) -> None:
        """Wait until everything is shown, not for long; the board's own exit handlers are not waited for either."""
        if not self._failed.is_set():
            self._events.put(None)
            self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            self._give_up("does not answer")
            self._thread.name = GIVEN_UP

    def _show(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._board.add(*event)
            self._board.close()
        except Exception as error:  # a library's own kinds
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split()))
            threading.Event().wait()  # until the end of the process, which its exit handlers must not delay

    def _give_up(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            tell(f"warning: {self._flag}: {why}; the run goes on without it, and metrics.jsonl has everything")
