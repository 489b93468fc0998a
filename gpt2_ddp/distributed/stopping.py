"""Being asked to stop: by a signal to any rank, or by a file named `stop` in the run directory."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from torch.distributed import is_torchelastic_launched

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.system.cli import first_of_node, leave, tell

MEETING_SECONDS = 0.5
"""How long a process that was asked to stop while it looks for the other ranks may take to leave by itself."""
STARTING_SECONDS = 10.0
"""The same while it reads, compiles or waits for a library: whatever it does, nothing is lost with it."""
INTERRUPTED_SECONDS = 2.0
"""The same after a second SIGINT, which must end it even where Python's handlers no longer run."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop. SIGHUP, of a terminal or SSH session that ends, stays ignored under `nohup`."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asked, signal.SIGHUP)


class StopRequest:
    """Remembers that somebody asked to stop. The handlers only set a flag; a second SIGINT ends the process at once.

    Python runs handlers in the main thread alone, which may wait in a collective, for an address or for a library. A
    thread therefore hears every signal too, by `signal.set_wakeup_fd`, and ends what cannot end by itself.
    """

    def __init__(self, out_dir: Path) -> None:
        """A stop file from before this start is taken away, but not by a worker that torchrun has restarted."""
        self.reason: str | None = None
        self._note_status: Callable[[str, dict[str, str]], None] | None = None
        self._patience: float | None = MEETING_SECONDS
        self._heard: list[tuple[signal.Signals, float]] = []
        self._file = out_dir / "stop"
        if os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._file.unlink(missing_ok=True)
        self._signals = stop_signals()
        for number in self._signals:
            signal.signal(number, self._note)
        self._pipe, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def met(self) -> None:
        """The ranks have found each other: now the run is put together."""
        self._patience = STARTING_SECONDS

    def started(self) -> None:
        """From now on there are steps, at whose ends a request is obeyed."""
        self._patience = None

    def at_end(self, note_status: Callable[[str, dict[str, str]], None] | None) -> None:
        """From now on `note_status` writes the state and why into status.json for `end`; None: nobody does."""
        self._note_status = note_status

    def end(self, state: str, why: str) -> None:
        """Tell those who read status.json of an end that comes at once; from any thread."""
        if self._note_status is not None:
            self._note_status(state, {"error" if state == "failed" else "reason": why})

    def asked(self) -> bool:
        """Whether a signal has come to this process, from any thread, however busy the main thread is."""
        return bool(self._heard)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            self.end("failed", "a second SIGINT")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

    def _listen(self) -> None:
        while True:
            if select.select([self._pipe], [], [], 0.1 if self._heard else None)[0]:
                now = time.monotonic()
                self._heard += [(signal.Signals(number), now) for number in os.read(self._pipe, 64)
                                if number in self._signals]  # fmt: skip
            if not self._heard:
                continue
            first, since = self._heard[0]
            interrupts = [at for number, at in self._heard if number == signal.SIGINT]
            if len(interrupts) > 1 and time.monotonic() > interrupts[1] + INTERRUPTED_SECONDS:
                self.end("failed", "a second SIGINT")
                leave(128 + signal.SIGINT, at_once=True)
            patience = self._patience
            if patience is not None and time.monotonic() > since + patience:
                self._leave_start(first)

    def _leave_start(self, first: signal.Signals) -> None:
        self.end("stopped", first.name)
        if first_of_node():
            tell(f"stopped by {first.name} before the first step: there is nothing to save")
        leave(0 if is_torchelastic_launched() else 75, at_once=True)

    def agreed(self, context: DistContext) -> bool:
        """Whether any rank was asked to stop; the same answer on all of them. Only rank 0 looks for the file."""
        if context.is_main and self.reason is None and self._file.exists():
            self.reason = "stop file"
        if not context.any(self.reason is not None):
            return False
        self.reason = next(reason for reason in context.gather(self.reason) if reason)
        return True

    def clear(self, context: DistContext) -> None:
        """Take the stop file away: it was obeyed."""
        if context.is_main:
            self._file.unlink(missing_ok=True)
