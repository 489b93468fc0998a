"""A run's checkpoints on a second disk, for machines that do not come back: notebooks with a mounted drive.

A mounted drive may have no rename, may rename in two steps, and may send what was written later and in another order.
So nothing here relies on a rename or on an order: a checkpoint counts when every file of it has the SHA-256 that its
manifest tells, and the one before it stays until then. The manifest is written last, which shows most torn copies
without reading them.

A run may go back and make checkpoints of the same names again: two are the same where their manifests are, to the byte.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from gpt2_ddp.checkpoint.choice import FINISHED, SUPERSEDED, checkpoints, set_aside
from gpt2_ddp.checkpoint.files import CHUNK, MANIFEST, faults, step_name
from gpt2_ddp.optim.schedules import SCHEDULES
from gpt2_ddp.system import files as disk

LOGS = ("config.json", "metrics.jsonl", "status.json")


def fetch(copy: Path, run: Path, *, say: Callable[[str], object] = print) -> None:
    """Bring the newest good checkpoint of `copy`, and the log, to the run directory `run`, which goes on from there.

    With it comes the one from which the run would go on for longer. Nothing is changed where `run` has one that is as
    new, or has gone back to before it, nor in `copy`.

    Raises:
        OSError: where a disk refuses it.
    """
    left = _left_behind(copy, run)
    for found in (path for path in checkpoints(copy / "checkpoints") if path not in left):
        if problems := faults(found):
            say(f"{found} is not whole ({', '.join(problems)}); passed over")
            continue
        here = [path.name for path in checkpoints(run / "checkpoints") if path.name >= found.name and not faults(path)]
        if here:
            say(f"{run} is at {here[0]}, {copy} at {found.name}: nothing to fetch")
        else:
            branch, there = _branch(copy), run / "checkpoints"
            if branch is None or branch in (found, *left) or faults(branch) or not faults(there / branch.name):
                branch = None
            for path in filter(None, (branch, found)):
                _copy_checkpoint(path, there / path.name)
                say(f"fetched {path}")
            _copy_logs(copy, run)
        return
    back = next((f"{run} has gone back to before {path.name} of {copy}: nothing to fetch" for path in left), None)
    say(back or f"no whole checkpoint in {copy}: the run begins")


@contextmanager
def kept(
    run: Path, copy: Path, *, every: float = 60.0, count: int = 2, say: Callable[[str], object] = print
) -> Iterator[None]:
    """Within it, the `count` newest checkpoints of `run` are copied to `copy` as they come, the one from which it would
    go on for longer, and its log.

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
    """Copies of those checkpoints of a run that count, in a run directory of their own."""

    def __init__(self, run: Path, copy: Path, *, count: int) -> None:
        self.run, self.copy, self.count = run, copy, count
        self._copied: dict[str, bytes] = {}
        """The manifests of those whose copies were seen to be whole, by name."""
        self._warned = False

    def update(self) -> list[str]:
        """Copy what is new, the oldest first, then take away what is older than that; what was done, in lines.

        Raises:
            OSError: where a disk refuses it, or a copy did not become what it is a copy of.
        """
        new = checkpoints(self.run / "checkpoints")[: self.count]
        if not new:
            return []
        branch, left = _branch(self.run), _left_behind(self.copy, self.run)
        there = checkpoints(self.copy / "checkpoints")
        ahead = [path for path in there if path.name > new[0].name and path not in left]
        if any(not faults(path) for path in ahead):
            said = [
                f"warning: {self.copy} is at {ahead[0].name}, ahead of {self.run}: fetch it first; nothing is copied"
            ]
            said, self._warned = [] if self._warned else said, True
            return said
        wanted = new if branch is None or branch in new else [*new, branch]
        said = []
        for source in reversed(wanted):
            target, manifest = self.copy / "checkpoints" / source.name, _manifest(source)
            if self._copied.get(source.name) == manifest or faults(source):
                continue
            if _manifest(target) != manifest or faults(target):
                if target in left:
                    self._retire(target, left[target])
                _copy_checkpoint(source, target)
                said.append(f"copied {source.name} to {self.copy}")
            self._copied[source.name] = manifest
        if any(self._copied.get(source.name) == _manifest(source) for source in wanted):
            self._take_away(left, ahead, [source.name for source in wanted])
            _copy_logs(self.run, self.copy)
        return said

    def _take_away(self, left: dict[Path, str], torn: list[Path], wanted: list[str]) -> None:
        """What the run has left behind, the newest last, by which that is known; torn copies, and those too old."""
        for path in reversed(left):
            if not _is_in(self.run, path):  # not made again
                self._retire(path, left[path])
        for path in torn:
            shutil.rmtree(path)
        for path in checkpoints(self.copy / "checkpoints")[self.count :]:
            if path.name not in wanted:
                shutil.rmtree(path)

    def _retire(self, path: Path, why: str) -> None:
        if why == FINISHED and not faults(path):
            set_aside(path, FINISHED)
        else:
            shutil.rmtree(path)
        self._copied.pop(path.name, None)  # a run may make the same bytes again


def _branch(run: Path) -> Path | None:
    """The checkpoint from before the cool-down, if there is one, by the flags in config.json; the run keeps it, too."""
    try:
        flags = disk.read_json(run / "config.json")["config"]
        kind = SCHEDULES[flags["schedule"]]
        step = kind(**{field.name: flags.get(field.name, 0.0) for field in fields(kind)}).branch_step
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, a torn copy, an older run
        return None
    path = run / "checkpoints" / step_name(step or 0)
    return path if step and path.is_dir() else None


def _left_behind(copy: Path, run: Path) -> dict[Path, str]:
    """The checkpoints of `copy` that `run` has gone back to before, newest first, and why it has set them aside.

    They are those that `run` still has as set aside, and what lies between them and the last that both have: of a
    fetched run, `copy` may have more.
    """
    there = checkpoints(copy / "checkpoints")
    aside = {path: why for path in there if (why := _set_aside_as(run, path))}
    both = next((path.name for path in there if _is_in(run, path)), "")
    newest = max((path.name for path in aside), default="")
    return {path: aside.get(path, SUPERSEDED) for path in there if path in aside or both < path.name < newest}


def _set_aside_as(run: Path, path: Path) -> str:
    """Why `run` has set aside the checkpoint of which `path` is a copy; empty where it has not."""
    for aside in [] if _is_in(run, path) else (run / "checkpoints").glob(f"{path.name}.*"):
        why = aside.suffix[1:].split("-")[0]
        if why in (FINISHED, SUPERSEDED) and _manifest(aside) == _manifest(path):
            return why
    return ""


def _is_in(run: Path, path: Path) -> bool:
    return _manifest(run / "checkpoints" / path.name) == _manifest(path) != b""


def _manifest(checkpoint: Path) -> bytes:
    """Its bytes, among them the SHA-256 of each file; none where there is no manifest."""
    try:
        return (checkpoint / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""


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
