"""torchrun as the launcher runs it: `python -m launch.agent ARGUMENTS`. A stop is not told as a failure."""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

from launch.console import settle

TORCHRUNS_LOGGERS = ("torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.multiprocessing.api")


class QuietStop(logging.Filter):
    """Leaves out the warnings that follow a signal to torchrun; what is wrong with a rank is an error, and stays."""

    stopping = False

    def filter(self, record: logging.LogRecord) -> bool:
        self.stopping = self.stopping or "death signal" in str(record.msg)
        return not self.stopping or record.levelno > logging.WARNING


def main() -> None:
    """torchrun, ending as the shell says it for a signal, without a page of traceback."""
    quiet = QuietStop()
    for name in TORCHRUNS_LOGGERS:
        logging.getLogger(name).addFilter(quiet)
    try:
        run.main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    finally:
        settle(sys.stdout)
        settle(sys.stderr)


if __name__ == "__main__":
    main()
