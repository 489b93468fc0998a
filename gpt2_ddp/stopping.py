"""Being asked to stop: by a signal to any rank, or by a file named `stop` in the run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from gpt2_ddp.distributed import DistContext

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked to stop. The handlers only set a flag; a second SIGINT ends the process at once."""

    def __init__(self, out_dir: Path) -> None:
        self.reason: str | None = None
        self._file = out_dir / "stop"
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

    def agreed(self, context: DistContext) -> bool:
        """Whether any rank was asked to stop; the same answer on all of them. Only rank 0 looks for the file."""
        if context.is_main and self.reason is None and self._file.exists():
            self.reason = "stop file"
        return context.any(self.reason is not None)

    def clear(self, context: DistContext) -> None:
        """Take the stop file away: it was obeyed, or it was meant for an earlier start."""
        if context.is_main:
            self._file.unlink(missing_ok=True)
