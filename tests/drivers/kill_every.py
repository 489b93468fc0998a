"""Writes a checkpoint again and again, each time killed one file operation later: kill_every.py CHECKPOINT FOLDER.

`CHECKPOINT` is one that a trainer wrote. In `FOLDER` lie the one before it and a broken one that was set aside; keeping
one checkpoint, a save writes and then prunes. Prints a line of JSON for each operation: what was found on the disk
after the death there, and after the next save.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drivers.disk import Disk

from gpt2_ddp.checkpoint.choice import newest_good, prune
from gpt2_ddp.checkpoint.files import Content, read_tensors, write_checkpoint

BEFORE, SAVED, NEXT = (f"step_{step:08d}" for step in (4, 8, 12))


def contents(checkpoint: Path) -> dict[str, Content]:
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
    return {path.name: read_tensors(path) if path.suffix == ".safetensors" else path.read_bytes() for path in files}


def died(folder: Path, files: dict[str, Content], operation: int) -> str | None:
    """Save in a child that dies at `operation`: the operation's name, or None where the save had fewer."""
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        return (folder / "operation").read_text() if os.WIFSIGNALED(status) else None
    disk = Disk(operation, on_death=lambda name: (folder / "operation").write_text(name))
    with disk.watched():
        write_checkpoint(folder / SAVED, files)
        prune(folder, keep=1)
    os._exit(0)


def main(checkpoint: Path, folder: Path) -> None:
    files = contents(checkpoint)
    operation = 0
    while True:
        operation += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder / BEFORE)
        (folder / f"{BEFORE}.broken").mkdir()
        name = died(folder, files, operation)
        if name is None:
            return
        found, said = newest_good(folder)
        assert found is not None
        same = contents(found).keys() == files.keys() and all(
            (found / name).read_bytes() == (checkpoint / name).read_bytes() for name in files
        )
        write_checkpoint(folder / NEXT, files)
        prune(folder, keep=1)
        left = sorted(path.name for path in folder.iterdir() if path.is_dir())
        print(json.dumps({"operation": name, "found": found.name, "said": said, "same": same, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
