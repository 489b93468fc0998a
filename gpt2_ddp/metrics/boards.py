"""Other places that show a run, TensorBoard and Weights & Biases: wanted, and never worth the run."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt2_ddp.system.cli import GIVEN_UP, tell
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

QUEUE_LENGTH = 10_000
"""Events that a slow board may be behind; one that is further behind is given up for the rest of the run."""
CLOSING_SECONDS = 30.0
"""How long a board may take at the end to show what it has been given."""


class Board(Protocol):
    """Another place that shows a run: its configuration when it is made, then its events and where it stands."""

    def add(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """An event of metrics.jsonl: its numbers, and a sample's text."""

    def stand(self, state: str, step: int, values: Mapping[str, Any]) -> None:
        """What status.json says."""

    def cut(self, last_step: int) -> None:
        """The steps after `last_step` are made again."""

    def close(self) -> None: ...


class TensorBoard:
    """Writes for TensorBoard into the folder `tensorboard` of the run directory.

    A start takes up where the one before was; what that one showed after `resumed_step` is purged.
    """

    def __init__(self, out_dir: Path, *, resumed_step: int, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ImportError: where the package is not installed.
        """
        self._directory = str(out_dir / "tensorboard")
        self._writer = self._opened(resumed_step)
        self._add_text("config", json.dumps(config, indent=2), resumed_step)

    def _opened(self, last_step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

        return SummaryWriter(self._directory, purge_step=last_step + 1)

    def add(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        for key, value in numbers(values).items():
            self._writer.add_scalar(f"{name}/{key}", value, step)
        if name == "sample":
            self._add_text("sample", values["text"], step)

    def stand(self, state: str, step: int, values: Mapping[str, Any]) -> None:
        self._add_text("status", f"{state} at step {step}\n{json.dumps(values) if values else ''}", step)
        self._writer.flush()

    def cut(self, last_step: int) -> None:
        self._writer.close()
        self._writer = self._opened(last_step)

    def _add_text(self, tag: str, text: str, step: int) -> None:
        """As it stands: TensorBoard takes text for Markdown, in which an indented line is code."""
        self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends to Weights & Biases, project gpt2_ddp, under the name of the run directory.

    That keeps the identity of the run, so that a later start goes on in the same one, also from where the directory was
    moved to. Offline each start writes a folder of its own, which `wandb sync` uploads to one run. What W&B was told of
    steps that are made again stays there, beside what they are now.
    """

    def __init__(self, out_dir: Path, *, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ImportError: where the package is not installed; else whatever wandb raises, without a key for instance.
        """
        import wandb  # slow to import, and an extra

        self._table, self._exit_code = wandb.Table, 0
        self._run = wandb.init(
            project="gpt2_ddp",
            name=out_dir.resolve().name,
            id=kept_identity(out_dir / "wandb_id"),
            resume="allow",
            dir=str(out_dir),
            config=dict(config),
            allow_val_change=True,  # a resumed run may have more steps, for instance
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        shown: dict[str, Any] = {f"{name}/{key}": value for key, value in numbers(values).items()}
        if name == "sample":
            shown["sample/text"] = self._table(columns=["step", "text"], data=[[step, values["text"]]])
        self._run.log({"step": step} | shown)

    def stand(self, state: str, step: int, values: Mapping[str, Any]) -> None:
        self._exit_code = int(state == "failed")
        self._run.summary.update({"state": state, "state_step": step} | dict(values))

    def cut(self, last_step: int) -> None: ...

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Of the values of an event, those that a curve can be drawn of; of a source of a mixture under its `data_dir`."""
    found = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    for source in values.get("sources", ()):
        found |= {f"{source['data_dir']}/{key}": value for key, value in numbers(source).items()}
    return found


def kept_identity(file: Path) -> str:
    """The identity in `file`, or a new one, which is in it from now on.

    Raises:
        OSError: where it cannot be written.
    """
    kept = file.read_text(errors="replace").strip() if file.exists() else ""
    if re.fullmatch(r"[0-9a-z]{8,64}", kept):
        return kept
    identity = uuid.uuid4().hex[:12]
    replace_file(file, identity + "\n")
    return identity


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
            extra = (
                f'; pip install -e ".[{flag.strip("-")}]" in the checkout'
                if isinstance(error, ImportError)
                else f"; {mend}"
            )
            raise UserError(f"{flag}: {said}{extra}") from error
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # signal handlers may put too
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._show, name=flag, daemon=True)
        self._thread.start()

    def add(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._put(lambda: self._board.add(name, step, values))

    def stand(self, state: str, step: int, values: Mapping[str, Any]) -> None:
        self._put(lambda: self._board.stand(state, step, values))

    def cut(self, last_step: int) -> None:
        self._put(lambda: self._board.cut(last_step))

    def _put(self, show: Callable[[], None]) -> None:
        if self._failed.is_set():
            return
        if self._events.qsize() < QUEUE_LENGTH:
            self._events.put(show)
        else:
            self._give_up("does not answer")

    def close(self) -> None:
        """Wait until everything is shown, not for long; the board's own exit handlers are not waited for either."""
        if not self._failed.is_set():
            self._events.put(None)
            deadline = time.monotonic() + CLOSING_SECONDS
            while self._thread.is_alive() and not self._failed.is_set() and time.monotonic() < deadline:
                self._thread.join(0.05)  # one that fails now is not waited for either
        if self._thread.is_alive():
            self._give_up("does not answer")
            self._thread.name = GIVEN_UP

    def _show(self) -> None:
        try:
            while (show := self._events.get()) is not None:
                show()
            self._board.close()
        except Exception as error:  # a library's own kinds
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split()))
            threading.Event().wait()  # until the end of the process, which its exit handlers must not delay

    def _give_up(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            tell(f"warning: {self._flag}: {why}; the run goes on without it, and metrics.jsonl has everything")
