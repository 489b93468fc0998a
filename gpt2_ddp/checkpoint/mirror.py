"""A run's checkpoints on a second disk, for machines that do not come back: notebooks with a mounted drive.

A mounted drive may have no rename, may rename in two steps, and may send what was written later and in another order.
So nothing here relies on a rename or on an order: a checkpoint counts when every file of it has the SHA-256 that its
manifest tells, and the one before it stays until then. The manifest is written last, which shows most torn copies
without reading them.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_ddp.checkpoint.choice import checkpoints
from gpt2_ddp.checkpoint.files import CHUNK, MANIFEST, faults
from gpt2_ddp.system import files as disk

LOGS = ("config.json", "metrics.jsonl", "status.json")


def fetch(copy: Path, run: Path, *, say: Callable[[str], object] = print) -> None:
    """Bring the newest good checkpoint of `copy`, and the log, to the run directory `run`, which goes on from there.

    Nothing is changed where `run` has one that is as new, nor in `copy`.

    Raises:
        OSError: where a disk refuses it.
    """
    for found in checkpoints(copy / "checkpoints"):
        if problems := faults(found):
            say(f"{found} is not whole ({', '.join(problems)}); passed over")
            continue
        here = [path.name for path in checkpoints(run / "checkpoints") if path.name >= found.name and not faults(path)]
        if here:
            say(f"{run} is at {here[0]}, {copy} at {found.name}: nothing to fetch")
        else:
            _copy_checkpoint(found, run / "checkpoints" / found.name)
            _copy_logs(copy, run)
            say(f"fetched {found}")
        return
    say(f"no whole checkpoint in {copy}: the run begins")


@contextmanager
def kept(
    run: Path, copy: Path, *, every: float = 60.0, count: int = 2, say: Callable[[str], object] = print
) -> Iterator[None]:
    """Within it, the `count` newest checkpoints of `run` are copied to `copy` as they come, and its log.

    It looks each `every` seconds, and at the end. What a disk refuses is said, and tried again the next time.
    """
    ended, mirror = threading.Event(), Mirror(run, copy, count=count)

    def work() -> None:
        while True:
            last = ended.wait(every)
            try:
                for line in mirror.update():
                    say(line)
            except OSError as error:
                say(f"warning: could not copy to {copy}: {error}")
            if last:
                return

    thread = threading.Thread(target=work, name="mirror")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Mirror:
    """Copies of the newest checkpoints of a run, in a run directory of their own."""

    def __init__(self, run: Path, copy: Path, *, count: int) -> None:
        self.run, self.copy, self.count = run, copy, count
        self._copied: set[str] = set()
        self._warned = False

    def update(self) -> list[str]:
        """Copy what is new, the oldest first, then take away what is older than that; what was done, in lines.

        Raises:
            OSError: where a disk refuses it, or a copy did not become what it is a copy of.
        """
        new = checkpoints(self.run / "checkpoints")[: self.count]
        if not new:
            return []
        ahead = [path for path in checkpoints(self.copy / "checkpoints") if path.name > new[0].name]
        if any(not faults(path) for path in ahead):
            said = [
                f"warning: {self.copy} is at {ahead[0].name}, ahead of {self.run}: fetch it first; nothing is copied"
            ]
            said, self._warned = [] if self._warned else said, True
            return said
        said = []
        for source in reversed(new):
            target = self.copy / "checkpoints" / source.name
            if source.name in self._copied or faults(source):
                continue
            if faults(target):
                _copy_checkpoint(source, target)
                said.append(f"copied {source.name} to {self.copy}")
            self._copied.add(source.name)
        if self._copied:
            for torn_or_old in (*ahead, *checkpoints(self.copy / "checkpoints")[len(ahead) + self.count :]):
                shutil.rmtree(torn_or_old)
            _copy_logs(self.run, self.copy)
        return said


def _copy_checkpoint(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)  # a copy that was torn
    target.mkdir(parents=True)
    for file in sorted(source.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        with open(file, "rb") as old, open(target / file.name, "wb") as new:
            shutil.copyfileobj(old, new, CHUNK)
            disk.flush(new)
    disk.flush_directory(target)
    if problems := faults(target):
        raise OSError(f"{target} is not what was copied ({', '.join(problems)})")


def _copy_logs(source: Path, target: Path) -> None:
    for name in LOGS:
        if (source / name).is_file():
            disk.replace_file(target / name, (source / name).read_bytes())
