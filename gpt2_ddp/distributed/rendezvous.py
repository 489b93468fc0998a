"""Which process of the run this is, and where it meets the others: torchrun's variables, and torchrun's store."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed.rendezvous import rendezvous

from gpt2_ddp.system.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

START_TIMEOUT = timedelta(minutes=30)
"""Until the first step is done: compilers, cold file systems and slow nodes take their time."""
CONNECT_TIMEOUT = timedelta(seconds=30)
"""To reach torchrun's store, which is up before a rank starts; where it is not, torchrun has died. Tried twice."""
ALONE = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
"""torchrun's variables, and what they are for a single process."""
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""How many processes mpirun or srun has started beside this one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among those of the run, and among those of its node."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that torchrun's variables give this process; that of a single one where torchrun did not start it.

    Raises:
        UserError: for variables that some other launcher left, or that cannot be torchrun's.
    """
    found = {name: environment[name] for name in ALONE if environment.get(name)}
    if "TORCHELASTIC_RUN_ID" not in environment:
        require_alone(found, environment)
        return Place()
    said = " ".join(f"{name}={value}" for name, value in found.items())
    if found.keys() != ALONE.keys() or not all(value.isdecimal() for value in found.values()):
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set, but {said or 'nothing else'} is not what torchrun sets: start with "
            "python -m launch or torchrun, or with env -u TORCHELASTIC_RUN_ID for a single process"
        )
    place = Place(**{name.lower(): int(value) for name, value in found.items()})
    if place.rank >= place.world_size or place.local_rank >= place.local_world_size:
        raise UserError(f"{said}: a rank is less than the number of ranks; start with python -m launch or torchrun")
    return place


def require_alone(found: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """
    Raises:
        UserError: where `found`, of torchrun's variables, or those of mpirun and srun tell of other processes.
    """
    if any(value != str(ALONE[name]) for name, value in found.items()):
        said = " ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{said} in the environment, but torchrun did not start this process: start with python -m launch or "
            f"torchrun, or with env {' '.join(f'-u {name}' for name in found)} for a single process"
        )
    for name in OTHER_LAUNCHERS:
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{name}={count}: started {count} times, each of which would train alone: start python -m launch once "
                f"on each node, or with env -u {name} for a single process"
            )


def meet(place: Place) -> tuple[Store, str]:
    """torchrun's store, and a prefix for the keys of this start; collective.

    Where all ranks are on this machine they meet on its loopback address: its name may not resolve, or to an address
    that it no longer has.
    """
    connect_timeout = CONNECT_TIMEOUT if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else START_TIMEOUT
    url = "env://"
    if place.local_world_size == place.world_size and "MASTER_PORT" in os.environ:
        url = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}?rank={place.rank}&world_size={place.world_size}"
    shared, rank, world_size = next(rendezvous(url, timeout=connect_timeout))
    shared.set_timeout(START_TIMEOUT)
    return shared, fresh_prefix(shared, rank, world_size)


def fresh_prefix(store: Store, rank: int, world_size: int) -> str:
    """A name for the keys of this start in a `store` that may still hold those of ranks that died; collective.

    torchrun keeps its store over restarts, and a restarted rank that reads the address of a dead one cannot connect
    (pytorch issues 135712 and 167288; the restart count is no name, since each node counts for itself). Rank 0
    therefore greets the others with a new name until each has answered with that name.
    """
    mine, name, deadline = uuid.uuid4().hex, uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds()
    if rank:
        store.set(f"hello/{rank}", mine)
        while not (welcome := _read(store, f"welcome/{rank}")).startswith(mine):
            _pause(deadline, "rank 0")
        store.set(f"thanks/{rank}", welcome)
        return welcome.removeprefix(mine)
    waiting = set(range(1, world_size))
    while waiting:
        for other in list(waiting):
            hello = _read(store, f"hello/{other}")
            store.set(f"welcome/{other}", hello + name)
            if hello and _read(store, f"thanks/{other}") == hello + name:
                waiting.remove(other)
        _pause(deadline, f"ranks {sorted(waiting)}")
    return name


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, missing: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"no answer from {missing} within {START_TIMEOUT}")
    time.sleep(0.02)
