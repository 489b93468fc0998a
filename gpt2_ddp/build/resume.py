"""Where a run goes on: what `--resume` means, what must not have changed, and what is kept of the start before."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from gpt2_ddp.build.prolonging import branch_to_prolong, kept_log, rate_jump
from gpt2_ddp.checkpoint.choice import FINISHED, SUPERSEDED, checkpoints, name_aside, named, newest_good
from gpt2_ddp.checkpoint.files import step_name
from gpt2_ddp.checkpoint.state import Found, read_state
from gpt2_ddp.config import TrainConfig, flag
from gpt2_ddp.data.sources import shown
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import TIME_FORMAT, read_json
from gpt2_ddp.system.precision import DTYPES

FIXED_FIELDS = ("model", "vocab_size", "seed", "sequence_length", "total_batch_size", "optimizer")
"""What must not change within a run, beside the data itself."""


def settle_resume(config: TrainConfig) -> str:
    """`--resume`, or `auto` where this start goes on with what an earlier one with that `--resume` began. For rank 0.

    So does the same command where `--resume` names a checkpoint: what was trained since counts. (`find_resume` refuses
    another command, unless the checkpoint is of this run.) Under `never`, which is to refuse what an earlier command
    left, so does only a restart by this torchrun, or a job that was queued again.
    """
    file = config.out_dir / "config.json"
    if config.resume == "auto" or not file.exists():
        return config.resume
    starts = read_json(file).get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else None
    if not isinstance(last, dict) or last.get("argv") != sys.argv:
        return config.resume
    if config.resume == "never":
        goes_on = was_restarted(str(last.get("time")))
    else:
        goes_on = bool(checkpoints(config.out_dir / "checkpoints"))
    return "auto" if goes_on else config.resume


def was_restarted(time_of_start: str) -> bool:
    """Whether the start at this time, as config.json has it, was of this torchrun or SLURM job as well."""
    by_slurm, by_torchrun = (os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    if by_slurm != "0" or by_torchrun == "0":
        return by_slurm != "0"
    torchrun = psutil.Process(os.getppid())
    try:
        return torchrun.create_time() < datetime.strptime(time_of_start, TIME_FORMAT).timestamp() + 1
    except ValueError:
        return False


def find_resume(config: TrainConfig, data_fingerprint: str) -> Found:
    """What `--resume` means in this run directory. Runs on rank 0, whose disk alone has to have the checkpoints.

    Raises:
        UserError: where the run there has another model, seed, batch or data, or nothing good is left of it; where
            `--resume` names a checkpoint of another run, and this one has some already.
    """
    directory, config_file = config.out_dir / "checkpoints", config.out_dir / "config.json"
    (config.out_dir / ".writable").touch()
    (config.out_dir / ".writable").unlink()
    if config.resume == "never":
        if config_file.exists() or checkpoints(directory):
            raise UserError(f"{config.out_dir} holds a run and --resume is never: choose another --out-dir")
        return Found()
    said: list[str] = []
    path: Path | None
    if config.resume == "auto":
        path, said = newest_good(directory)
    else:
        path, said = named(Path(config.resume))
    own = checkpoints(directory)
    if path is None:
        if config_file.exists():
            require_same_run(config, read_json(config_file), data_fingerprint, config.out_dir)
            said.append(f"{config.out_dir} holds a run without a checkpoint: starting it again from step 0")
        return Found(said=said)
    of_this_run = path.resolve() in [other.resolve() for other in own]
    if own and not of_this_run and path.resolve().parent != directory.resolve():  # nor one that was set aside here
        raise UserError(
            f"--resume {config.resume} is another run's, and {config.out_dir} has {own[0].name} already: leave "
            "--resume out to go on from there, or choose another --out-dir"
        )
    state = read_state(path)
    require_same_run(config, state, data_fingerprint, config.out_dir if config.resume == "auto" else path)
    branch = branch_to_prolong(config, state, directory) if config.resume == "auto" else None
    aside: list[tuple[Path, str]] = []
    if branch is not None:
        aside.append((path, FINISHED))
        stays, log = name_aside(path, FINISHED).name, kept_log(config.out_dir, path).name
        said.append(f"going back to before the cool-down: {path.name} stays as {stays}, its log as {log}")
        path, state = branch, read_state(branch)
    for other in checkpoints(directory):
        newer = other.name > step_name(state["step"])
        if (newer or not of_this_run) and (other, FINISHED) not in aside:
            why = "is newer" if newer else "may not lead to it"
            aside.append((other, SUPERSEDED))
            said.append(f"{other.name} {why}; set aside as {name_aside(other, SUPERSEDED).name}")
    said.append(f"resuming {config.out_dir} from {path} at step {state['step']}")
    said += [] if branch else rate_jump(config, state["config"], state["step"])
    return Found(path=path, state=state, said=said, aside=aside)


def saved_micro_batch(config: TrainConfig, world_size: int) -> int | None:
    """The micro-batch of the run in --out-dir, which a resume should keep; None where there is none that divides."""
    file = config.out_dir / "config.json"
    saved = read_json(file).get("config") if config.resume == "auto" and file.exists() else None
    size = saved.get("micro_batch_size") if isinstance(saved, dict) else None
    if not isinstance(size, int) or size < 1 or config.total_batch_size % (size * config.sequence_length * world_size):
        return None
    return size


def saved_dtype(config: TrainConfig, device_type: str) -> str | None:
    """The number format, as `--dtype` takes it, of the last start of the run that `--resume` continues.

    None where there is no such run, or where it computed on another kind of device: what is fast there says nothing.
    Nor where its config.json cannot be read, which for another run's is no reason to refuse its checkpoint.
    """
    given = Path(config.resume).resolve()
    above = [path for path in (given, given.parent, given.parent.parent) if (path / "config.json").is_file()]
    run_dir = config.out_dir if config.resume == "auto" or not above else above[-1]
    file = run_dir / "config.json"
    try:
        starts = read_json(file).get("starts") if config.resume != "never" and file.exists() else None
    except ValueError:
        return None
    last = starts[-1] if isinstance(starts, list) and starts else None
    if not isinstance(last, dict) or str(last.get("device")).split(":")[0] != device_type:
        return None
    name = str(last.get("dtype")).removeprefix("torch.")
    return name if name in DTYPES else None


def require_same_run(config: TrainConfig, saved: dict[str, Any], data_fingerprint: str, place: Path) -> None:
    """`saved` is the state of the run in `place`, the run directory or a checkpoint that `--resume` names.

    Raises:
        UserError: naming each field that must not change within a run and did.
    """
    saved_config = saved.get("config")
    found = differences(saved_config if isinstance(saved_config, dict) else {}, config)
    if saved.get("data_fingerprint") != data_fingerprint:
        weights = "" if isinstance(config.data_dir, Path) else ", in this order and by these weights,"
        found.append(f"the tokens in --data-dir {shown(config.data_dir)}{weights} are not those the run was trained on")
    if found:
        mend = "Choose another --out-dir" if place == config.out_dir else "Leave --resume out"
        weights = f", with --init-from {place} to begin with its weights" if config.init_from is None else ""
        raise UserError(f"{place} is another run: {'; '.join(found)}. {mend}{weights}")


def differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The fields that must not change within a run and differ from those of `saved`, each as one phrase."""
    now = config.to_json()
    return [
        f"{flag(name)} is {now[name]}, the run has {str(saved.get(name))[:60]}"
        for name in FIXED_FIELDS
        if saved.get(name) != now[name]
    ]
