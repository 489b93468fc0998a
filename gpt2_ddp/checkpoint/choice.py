"""Which checkpoint of a run to take up, which are broken, and which go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gpt2_ddp.checkpoint.files import MANIFEST, Stamp, faults, stamp, step_name
from gpt2_ddp.system import files as disk
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json

WEIGHTS = "model.safetensors"
FINISHED = "finished"
"""Why the last checkpoint of a run that is prolonged is set aside."""
SUPERSEDED = "superseded"
"""Why checkpoints are that are newer than the one from which a run goes on."""


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first, whatever their state; what was set aside is not among them."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or None where there is none at all, and what was found broken.

    Broken ones that are newer are set aside under a name that says so.

    Raises:
        UserError: where there are checkpoints and all are broken; none of them is touched.
    """
    broken: list[tuple[Path, str]] = []
    for path in checkpoints(directory):
        problems = faults(path)
        if not problems:
            said = [f"{bad} is broken ({what}); set aside as {set_aside(bad, 'broken').name}" for bad, what in broken]
            return path, said
        broken.append((path, ", ".join(problems)))
    if broken:
        listed = "; ".join(f"{path.name}: {what}" for path, what in broken)
        raise UserError(f"every checkpoint in {directory} is broken ({listed}): restore one, or use another --out-dir")
    return None, []


def named(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint `path`, or the newest good one of the run directory `path`, and what was passed over in it.

    Raises:
        UserError: where there is none, or none that verifies; nothing is touched.
    """
    directory = next((place for place in (path / "checkpoints", path) if checkpoints(place)), None)
    if directory is None:
        if problems := faults(path):
            mend = "give a run directory, or a step_... folder of its checkpoints"
            raise UserError(f"cannot resume from {path}: {', '.join(problems)}; {mend}")
        return path, []
    passed_over: list[str] = []
    for found in checkpoints(directory):
        if not (problems := faults(found)):
            return found, passed_over
        passed_over.append(f"{found} is broken ({', '.join(problems)}); passed over")
    raise UserError(f"cannot resume from {path}: {'; '.join(passed_over)}; give another run or checkpoint")


def require_whole_weights(directory: Path) -> None:
    """
    Raises:
        UserError: where the weights in a checkpoint, or in what `eval convert` made, are not those that were written.
            Other models have no manifest of ours, and pass.
    """
    try:
        is_ours = "files" in read_json(directory / MANIFEST)
    except FileNotFoundError:
        return
    except (OSError, UserError):
        is_ours = True
    if is_ours and (problems := faults(directory, of=WEIGHTS)):
        raise UserError(
            f"{directory} is broken ({', '.join(problems)}): name another checkpoint; if you changed it yourself, "
            f"remove {MANIFEST} there"
        )


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no run takes it up again, and return its new name."""
    target = name_aside(path, why)
    disk.rename(path, target)
    return target


def name_aside(path: Path, why: str) -> Path:
    """The name that `set_aside` gives a checkpoint."""
    target, number = path.with_name(f"{path.name}.{why}"), 2
    while target.exists():
        target, number = path.with_name(f"{path.name}.{why}-{number}"), number + 1
    return target


def prune(directory: Path, keep: int, *, beside: int | None = None, verified: dict[Path, Stamp] | None = None) -> None:
    """Keep the `keep` newest good checkpoints, and the one of step `beside`. A broken one never counts, and goes with
    those that are too old; one that was set aside as finished stays.

    `verified`, the stamps of checkpoints that were found good, spares reading these again, and is brought up to date.
    """
    good, verified = list[Path](), verified if verified is not None else {}
    for path in checkpoints(directory):
        if beside is not None and path.name == step_name(beside):
            continue
        if len(good) == keep:
            shutil.rmtree(path, ignore_errors=True)  # of what is open on NFS something stays, until the next save
        elif (path not in verified or verified[path] != stamp(path)) and faults(path):
            set_aside(path, "broken")
        else:
            good.append(path)
            verified[path] = stamp(path)
    if len(good) == keep:
        for path in directory.glob("step_*.*"):
            step = path.name[5:].split(".")[0]
            if step.isdecimal() and int(step) < int(good[-1].name[5:]) and f".{FINISHED}" not in path.name:
                shutil.rmtree(path, ignore_errors=True)
