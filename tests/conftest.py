"""What the tests share: the data they train on, and finished runs that they compare with and must not change."""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drivers import warm
from filelock import FileLock
from running import train, write_shards

if TYPE_CHECKING:
    from data_prep.encoding import Encoder

LONG = (
    "test_slurm.py", "test_train.py", "test_killed.py", "test_hang_and_drift.py", "test_launch_local.py",
    "test_stopping.py", "test_soak.py", "test_memory.py", "test_bench.py", "test_gpu_kit.py",
    "test_hellaswag_harness.py", "test_saving.py", "test_files.py", "test_console.py", "test_kernels.py",
)  # fmt: skip
"""The files with tests of half a minute, the longest first."""


def pytest_configure() -> None:
    """The tests' processes hear what they are sent, also where the suite was started under `nohup` or behind a `&`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process of pytest-xdist begins with some of the long files, so that at the end none works on alone.

    A process is given as many tests as the others, in a row, and one that is done takes the last of another's.
    """
    if not hasattr(config, "workerinput"):
        return
    workers = config.workerinput["workercount"]
    long = [[item for item in items if item.path.name == name] for name in LONG]
    rest = iter([item for item in items if item.path.name not in LONG])
    dealt = list[pytest.Item]()
    for worker in range(workers):
        first = list(itertools.chain(*long[worker::workers]))
        dealt += [*first, *itertools.islice(rest, max(0, len(items) // workers - len(first)))]
    items[:] = [*dealt, *rest]


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
                as_a_user = nproc == 1 or any(flag.startswith("--device=") for flag in flags)
                run = train if as_a_user else warm.fork_small
                done = run(folder, data_dir, *flags, nproc=nproc)
                (folder / "stdout").write_text(done.stdout)
                (folder / "stderr").write_text(done.stderr)
        return folder

    return finished


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """GPT-2's tokenizer as a worker of data_prep has it, which takes a while to make."""
    from data_prep.encoding import Encoder

    return Encoder()


@pytest.fixture
def tokenized_here(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is prepared in this process, by GPT-2's tokenizer."""
    from data_prep_runs import tokenize_here  # which wants pyarrow: this file must do without, see tests/gpu.sh

    tokenize_here(monkeypatch, encoder)
