"""What the launcher finds on a machine that is not here: a /sys and an environment made for the purpose."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from launch import discovery
from launch.plan import Core, LaunchFlags, SlurmStep, plan

STEP = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURMD_NODENAME": "node08",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_NTASKS": "9",
    "SLURM_NNODES": "9",
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of two cores with two threads each, one NUMA node a socket; in Linux's numbering CPU n + 4 is the
    second thread of CPU n's core, and cores are counted within their socket.
    """
    for cpu in range(8):
        topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (topology / "core_id").write_text(f"{cpu % 2}\n")
    for number, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        (tmp_path / "node" / f"node{number}").mkdir(parents=True)
        (tmp_path / "node" / f"node{number}" / "cpulist").write_text(f"{cpus}\n")
    monkeypatch.setattr(discovery, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(discovery, "NUMA_NODES", tmp_path / "node")
    monkeypatch.setattr(discovery.sys, "platform", "linux")
    run_on(monkeypatch, *range(8))
    return tmp_path


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "probe", lambda: {"gpus": [], "metal": False, "options": [], "reason": ""})


def run_on(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus), raising=False)


@pytest.mark.usefixtures("machine")
def test_two_threads_of_a_core_are_one_core() -> None:
    assert discovery.find_cores() == (
        Core(cpus=(0, 4), numa_node=0),
        Core(cpus=(1, 5), numa_node=0),
        Core(cpus=(2, 6), numa_node=1),
        Core(cpus=(3, 7), numa_node=1),
    )


@pytest.mark.usefixtures("machine")
def test_only_what_this_process_may_run_on_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(monkeypatch, 1, 5, 6)
    assert discovery.find_cores() == (Core(cpus=(1, 5), numa_node=0), Core(cpus=(6,), numa_node=1))
    run_on(monkeypatch, 2, 40)  # a virtual machine need not tell of topology or nodes
    assert discovery.find_cores() == (Core(cpus=(2,), numa_node=1), Core(cpus=(40,), numa_node=0))


def test_elsewhere_the_physical_cores_are_psutils(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery.sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16 if logical else 10)
    assert len(discovery.find_cores()) == 10


def without(*names: str, **changed: str) -> dict[str, str]:
    return {name: value for name, value in (STEP | changed).items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/root"}, None),
        (
            without("SLURM_STEP_NODELIST", SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="1"),
            SlurmStep(job_id=42, step_id="3", nodes=1, tasks=1, cpus=16),
        ),
        (
            without("SLURM_STEP_NODELIST", SLURM_STEP_NUM_NODES="1", SLURM_CPUS_PER_TASK="6"),
            SlurmStep(job_id=42, step_id="3", nodes=1, tasks=2, cpus=6),
        ),
        (
            {"SLURM_JOB_ID": "42", "SLURM_NNODES": "4", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "3"},
            SlurmStep(job_id=42, step_id="", nodes=4, tasks=1, cpus=0),
        ),
        (
            {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "1", "SLURM_CPUS_ON_NODE": "8"},
            SlurmStep(job_id=42, step_id="", nodes=1, tasks=1, cpus=8),
        ),
        (STEP, SlurmStep(job_id=42, step_id="3", nodes=2, tasks=2, cpus=16, first_host="node07", own_host="node08")),
    ],
    ids=[
        "no SLURM",
        "a step on one node",
        "CPUs for each task",
        "an allocation without srun",
        "a batch script of eight tasks",
        "a step on two nodes",
    ],
)
def test_what_slurm_says(
    environment: Mapping[str, str], expected: SlurmStep | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = {"node[07-08]": "node07\nnode08\n"}
    monkeypatch.setattr(discovery, "scontrol", lambda *arguments: hosts[arguments[-1]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, _: [name])
    assert discovery.find_slurm(environment, LaunchFlags()) == expected


@pytest.mark.usefixtures("machine", "without_gpus")
@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURMD_NODENAME"])
def test_a_container_with_some_of_slurms_variables_says_which_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "first_host", str)
    monkeypatch.setattr(discovery, "reachable", str)
    with pytest.raises(ValueError, match=f"{missing} is not set in here; .*--nnodes 2 --rdzv-endpoint HOST:PORT"):
        discovery.discover(without(missing), LaunchFlags())


@pytest.mark.parametrize(
    ("flags", "nnodes", "meet_at"),
    [
        (LaunchFlags(nnodes=1), 1, ""),
        (LaunchFlags(nnodes=2, rdzv_endpoint="box:29500"), 2, "box:29500"),
        (LaunchFlags(rdzv_endpoint="box:29500"), 2, "box:29500"),
        (LaunchFlags(), 0, "scontrol .* fails .*: --nnodes 2 --rdzv-endpoint HOST:PORT"),
        (LaunchFlags(nnodes=3), 0, "--nnodes 3 .* needs --rdzv-endpoint HOST:PORT"),
    ],
    ids=["one node", "a place", "a place alone", "nothing", "more than the step has"],
)
@pytest.mark.usefixtures("machine", "without_gpus")
def test_hosts_are_looked_up_only_where_the_nodes_meet_by_themselves(
    flags: LaunchFlags, nnodes: int, meet_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container in the job's step has its variables, and no scontrol."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if nnodes:
        planned = plan(discovery.discover(STEP, flags), flags)
        assert (planned.nnodes, planned.rendezvous) == (nnodes, meet_at)
    else:
        with pytest.raises(ValueError, match=meet_at):
            plan(discovery.discover(STEP, flags), flags)
    with pytest.raises(ValueError, match="9 tasks on 2 nodes"):
        discovery.discover(without(SLURM_STEP_NUM_TASKS="9"), LaunchFlags())


def test_a_node_is_reached_by_the_first_of_its_names_that_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"10.0.0.7"}

    def getaddrinfo(name: str, _: object) -> list[str]:
        if name not in known:
            raise OSError("Name or service not known")
        return [name]

    shown = "NodeName=node07 Arch=x86_64 CPUTot=64 NodeAddr=10.0.0.7 NodeHostName=box7 State=IDLE"
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(discovery, "scontrol", lambda *_: shown)
    assert discovery.reachable("node07") == "10.0.0.7"
    known.update(["box7", "node07"])
    assert discovery.reachable("node07") == "node07"
    known -= {"node07", "10.0.0.7"}
    assert discovery.reachable("node07") == "box7"
    known.clear()
    with pytest.raises(ValueError, match="no address for SLURM's node node07"):
        discovery.reachable("node07")


@pytest.mark.usefixtures("machine", "without_gpus")
@pytest.mark.parametrize(
    ("environment", "quota", "ranks", "threads"),
    [
        ({}, None, 2, 2),  # four cores, not eight CPUs
        ({}, 2.0, 2, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "2"}, None, 2, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "1"}, 3.0, 1, 1),
        ({"OMP_NUM_THREADS": "3"}, None, 2, 3),
    ],
)
def test_a_machines_ranks_and_threads(
    monkeypatch: pytest.MonkeyPatch,
    environment: Mapping[str, str],
    quota: float | None,
    ranks: int,
    threads: int,
) -> None:
    """From what is found to what is started: nothing that was found is lost on the way."""
    monkeypatch.setattr(discovery, "find_cpu_quota", lambda: quota)
    monkeypatch.setattr(discovery, "find_tcmalloc", lambda: "libtcmalloc_minimal.so.4")
    flags = LaunchFlags(nnodes=1, cpu=True)
    planned = plan(discovery.discover(environment, flags), flags)
    assert (planned.nproc_per_node, planned.threads_per_rank) == (ranks, threads)
    assert planned.environment["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    ours = quota is None and "SLURM_JOB_ID" not in environment
    assert planned.affinity == (((0, 1, 4, 5), (2, 3, 6, 7)) if ours else ())


def test_a_driver_that_is_too_old_is_no_gpu_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPUs are counted by NVML; the first look at one fails."""
    driver = """
import torch
def fail(*_):
    raise RuntimeError("The NVIDIA driver on your system\\nis too old (found version 11040).")
torch.cuda.device_count, torch.cuda.get_device_properties, torch.cuda.init = (lambda: 1), fail, fail
"""
    monkeypatch.setattr(discovery, "PROBE", driver + discovery.PROBE)
    probed = discovery.probe()
    assert probed["gpus"] == []
    assert str(probed["reason"]).startswith("The NVIDIA driver on your system is too old (found version 11040)")


@pytest.mark.usefixtures("machine")
def test_what_is_set_already_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "Tesla T4", "memory_bytes": 15 << 30, "pci": [0, 1, 2]}
    probed = {"gpus": [gpu, gpu], "metal": False, "options": ["--nnodes", "--signals-to-handle"], "reason": ""}
    monkeypatch.setattr(discovery, "probe", lambda: probed)
    environment = {"LD_PRELOAD": "libmine.so", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "5"}
    found = discovery.discover(environment, LaunchFlags())
    assert (found.ld_preload, found.omp_num_threads, found.under_torchrun) == ("libmine.so", "5", True)
    assert (len(found.gpus), found.torchrun_options) == (2, {"--nnodes", "--signals-to-handle"})
    assert found.memory_bytes == psutil.virtual_memory().total
