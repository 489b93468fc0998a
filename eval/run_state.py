"""Whether the trainer of a run directory still lives."""

from __future__ import annotations

import socket
from datetime import datetime
from pathlib import Path

import psutil

from gpt2_ddp.system.files import TIME_FORMAT, read_json


def died(run: Path) -> str | None:
    """One line where status.json says that the run goes on, but its process is gone; None where that is not known.

    Known it is on the machine of the run alone. A process of that number which began later is another one.
    """
    try:
        status = read_json(run / "status.json")
        running = status["state"] == "running" and status["host"] == socket.gethostname()
        pid, written = int(status["pid"]), datetime.strptime(status["time"], TIME_FORMAT).timestamp()
    except (OSError, ValueError, KeyError, TypeError):  # no run, an older one, or a file that is not ours
        return None
    if not running:
        return None
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() < written + 1:
            return None
    except psutil.AccessDenied:
        return None
    except psutil.NoSuchProcess:
        pass
    return f"{run}: status.json says running, but its process has died; the same command goes on where it last saved"
