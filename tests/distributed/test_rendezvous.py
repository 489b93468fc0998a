"""Which process this is: torchrun's variables, and what other launchers leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import warm

from gpt2_ddp.distributed.rendezvous import Place, find_place

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_torchruns_place_and_a_single_process() -> None:
    assert find_place(TORCHRUN) == Place(rank=3, local_rank=1, world_size=4, local_world_size=2)
    alone = {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "MASTER_ADDR": "a",
        "SLURM_STEP_NUM_TASKS": "1",
        "OMPI_COMM_WORLD_SIZE": "1",
    }
    assert find_place({}) == find_place(alone) == Place()


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "env -u RANK -u WORLD_SIZE"),
        ({"RANK": "3"}, "RANK=3 in the environment, but torchrun did not start"),
        ({"LOCAL_RANK": "1"}, "env -u LOCAL_RANK"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: started 4 times"),
        ({"PMI_SIZE": "2"}, "env -u PMI_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "python -m launch once on each node"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "nothing else is not what torchrun sets"),
        (TORCHRUN | {"RANK": "-1"}, "is not what torchrun sets"),
        (TORCHRUN | {"RANK": "4"}, "a rank is less than the number of ranks"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "a rank is less than the number of ranks"),
    ],
)
def test_what_other_launchers_leave_is_refused(left: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_place(left)


def test_left_over_variables_are_one_line(data_dir: Path, tmp_path: Path) -> None:
    left = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = warm.train(tmp_path / "run", data_dir, faults={"variables": left}, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 in the environment, but torchrun did not start")
