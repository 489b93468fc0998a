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
        """A stop file from before this start is taken away, but not by a worker that torchrun has restarted."""
        self.reason: str | None = None
        self._file = out_dir / "stop"
        if os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._file.unlink(missing_ok=True)
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
        if not context.any(self.reason is not None):
            return False
        self.reason = next(reason for reason in context.gather(self.reason) if reason)
        return True

    def clear(self, context: DistContext) -> None:
        """Take the stop file away: it was obeyed."""
        if context.is_main:
            self._file.unlink(missing_ok=True)
