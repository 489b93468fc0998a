"""launch/slurm.sbatch on a real SLURM of two nodes: warned, requeued, cancelled, struck, and still the same weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from running import ROOT, SMALL, checkpoint, environment, final_hashes, metrics, status, steps, wait_until
from slurm_cluster import SlurmCluster, missing_parts, slurm_cluster

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts())

FLAGS = ("--max-steps", "80", "--checkpoint-every", "30", "--total-batch-size", "64")
"""Long enough for something to happen to it after the first checkpoint."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), environment({"PYTHON": sys.executable})) as running:
        yield running


@pytest.fixture
def submit(cluster: SlurmCluster, tmp_path: Path, data_dir: Path) -> Callable[..., str]:
    """Submits the trainer on both nodes, into `tmp_path`/run, as a file says; gives the job's id."""
    (tmp_path / "run.toml").write_text(f'out-dir = "{tmp_path}/run"\ndata-dir = "{data_dir}"\n')

    def submitted(*flags: str, time: str = "60", asked: tuple[str, ...] = ("--nodes=2", "--cpus-per-task=1")) -> str:
        small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
        places = ["--config", tmp_path / "run.toml"]
        own = [*asked, f"--output={tmp_path}/log", f"--time={time}"]
        command = ["sbatch", "--parsable", *own, ROOT / "launch" / "slurm.sbatch", *small, *places, *flags]
        return cluster.run(*command, cwd=ROOT)

    return submitted


def wait_for_state(cluster: SlurmCluster, job_id: str, state: str, folder: Path) -> dict[str, str]:
    """The job, once it is in `state`; a job that ended otherwise fails the test with its log."""

    def reached() -> bool:
        found = cluster.job(job_id)["JobState"]
        log = folder / "log"
        ended = found in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        assert found == state or not ended, f"{found}: {log.read_text() if log.exists() else 'no log'}"
        return found == state

    wait_until(reached, timeout=300)
    return cluster.job(job_id)


def ranks_on(cluster: SlurmCluster, node: str) -> list[psutil.Process]:
    """The trainer's processes on a node: torchrun gives them a LOCAL_RANK, slurmd the node's name."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:
            continue
        mine = variables.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
        if mine and variables.get("SLURMD_NODENAME") == node and "LOCAL_RANK" in variables:
            found.append(process)
    return found


def test_warned_it_saves_is_requeued_and_ends_at_the_clean_weights(
    cluster: SlurmCluster, submit: Callable[..., str], clean_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job_id = submit(*FLAGS)
    wait_until(lambda: steps(run) > 5, timeout=300)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    wait_for_state(cluster, job_id, "PENDING", tmp_path)
    stopped = status(run)
    assert stopped["state"] == "stopped"
    assert checkpoint(run).name == f"step_{stopped['step']:08d}"
    assert not (run / "stop").exists()

    job = wait_for_state(cluster, job_id, "COMPLETED", tmp_path)
    assert job["Restarts"] == "1"
    assert [entry["world_size"] for entry in metrics(run, "start")] == [2, 2]
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 81))
    assert status(run)["state"] == "finished"
    assert final_hashes(run) == final_hashes(clean_run(*FLAGS, nproc=2))


def check_requeued(cluster: SlurmCluster, job_id: str, folder: Path) -> None:
    """The job stopped with a checkpoint, goes on from it by itself, and is not queued again when asked to stop."""
    wait_for_state(cluster, job_id, "PENDING", folder)
    stopped = status(folder / "run")
    assert (stopped["state"], checkpoint(folder / "run").name) == ("stopped", f"step_{stopped['step']:08d}")
    wait_until(lambda: steps(folder / "run") > stopped["step"], timeout=300)
    assert [entry["step"] for entry in metrics(folder / "run", "start")] == [0, stopped["step"]]
    (folder / "run" / "stop").touch()
    assert wait_for_state(cluster, job_id, "COMPLETED", folder)["Restarts"] == "1"


@pytest.mark.slow
def test_at_the_time_limit_it_is_requeued(cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """SLURM itself sends the signal of the script's own --signal line."""
    job_id = submit("--max-steps", "100000", "--checkpoint-every", "0", time="3")
    wait_until(lambda: steps(tmp_path / "run") > 5, timeout=300)
    check_requeued(cluster, job_id, tmp_path)


@pytest.mark.slow
def test_preempted_it_is_requeued(cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """The ranks are sent SIGTERM and the script nothing, as by `scancel`; but the job has to come back."""
    job_id = submit("--max-steps", "100000", "--checkpoint-every", "0")
    wait_until(lambda: steps(tmp_path / "run") > 5, timeout=300)
    urgent = ["--partition=urgent", "--nodes=2", f"--output={tmp_path}/urgent", "--wrap=sleep 1"]
    cluster.run("sbatch", *urgent, cwd=tmp_path)
    check_requeued(cluster, job_id, tmp_path)


def test_scancel_leaves_a_checkpoint_of_the_last_step(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job_id = submit("--max-steps", "100000", "--checkpoint-every", "0")
    wait_until(lambda: steps(run) > 5, timeout=300)
    cluster.run("scancel", job_id)
    wait_for_state(cluster, job_id, "CANCELLED", tmp_path)
    wait_until(lambda: not ranks_on(cluster, "n1") + ranks_on(cluster, "n2"))
    stopped = status(run)
    assert stopped["state"] == "stopped", (tmp_path / "log").read_text()
    assert checkpoint(run).name == f"step_{stopped['step']:08d}"
    assert steps(run) == stopped["step"]


def test_a_killed_rank_restarts_both_nodes_and_ends_at_the_clean_weights(
    cluster: SlurmCluster, submit: Callable[..., str], clean_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job_id = submit(*FLAGS)
    wait_until(lambda: steps(run) > 35, timeout=300)
    (victim,) = ranks_on(cluster, "n2")
    victim.kill()
    job = wait_for_state(cluster, job_id, "COMPLETED", tmp_path)
    assert job["Restarts"] == "0"
    assert [entry["step"] for entry in metrics(run, "start")] == [0, 30]
    assert final_hashes(run) == final_hashes(clean_run(*FLAGS, nproc=2))


def test_a_user_error_fails_the_job_at_once_and_is_not_requeued(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job_id = submit("--total-batch-size", "33")
    wait_until(lambda: cluster.job(job_id)["JobState"] in {"FAILED", "COMPLETED"}, timeout=300)
    job = cluster.job(job_id)
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log
    assert "error: " in log
    assert "33" in log
    assert "1 CPU(s) and 0 GPU(s) on a node: sbatch --cpus-per-gpu=8, or --cpus-per-task=N without GPUs" in log
    assert "Traceback" not in log


def test_cpus_may_be_asked_for_by_gpu(cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """SLURM refuses that beside what the script or `srun` asks for by task."""
    job_id = submit("--max-steps", "1", asked=("--gpus-per-node=1", "--cpus-per-gpu=1"))
    wait_for_state(cluster, job_id, "COMPLETED", tmp_path)
    assert steps(tmp_path / "run") == 1
    assert "1 CPU(s) and 1 GPU(s) on a node: sbatch --cpus-per-gpu=8" in (tmp_path / "log").read_text()
