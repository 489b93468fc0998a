"""What the tests share: the data they train on, and finished runs that they compare with and must not change."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from drivers import warm
from filelock import FileLock
from running import train, train_command, write_shards


def pytest_configure() -> None:
    """The tests' processes hear what they are sent, also where the suite itself was started under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One folder for the whole session, over all the processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def data_dir(shared_folder: Path) -> Path:
    """Small token shards, the same for all; a test that changes data makes its own."""
    with FileLock(shared_folder / "data.lock"):
        folder = shared_folder / "data"
        if not folder.exists():
            write_shards(shared_folder / "data.unfinished").rename(folder)
    return folder


@pytest.fixture(scope="session")
def clean_run(shared_folder: Path, data_dir: Path) -> Callable[..., Path]:
    """`clean_run(*flags, nproc=0)`: a run directory that nothing disturbed, made once a session. Copy it to change it.

    What the run printed lies in it as `stdout` and `stderr`.
    """

    def finished(*flags: str, nproc: int = 0) -> Path:
        key = hashlib.sha256(repr((flags, nproc)).encode()).hexdigest()[:16]
        folder = shared_folder / key
        with FileLock(shared_folder / f"{key}.lock"):
            if not (folder / "stderr").exists():
                if nproc > 1 and "--device=cuda" not in flags:
                    command = train_command(folder, data_dir, *flags)
                    done: warm.Ended | CompletedProcess[str] = warm.fork_trainers(nproc, command[3:])
                else:
                    done = train(folder, data_dir, *flags, nproc=nproc)
                (folder / "stdout").write_text(done.stdout)
                (folder / "stderr").write_text(done.stderr)
        return folder

    return finished
