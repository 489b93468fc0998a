"""`launch.plan` is a pure function: the right torchrun command for machines that are not here."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from launch import discovery
from launch.__main__ import parse
from launch.plan import Core, Found, Gpu, LaunchFlags, SlurmStep, plan

GIB = 2**30
NO_FLAGS = LaunchFlags()
T4 = Gpu(name="Tesla T4", memory_bytes=15 * GIB)
A100 = Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB)


def cores(count: int, *, numa_nodes: int = 1, threads: int = 1) -> tuple[Core, ...]:
    """`count` cores in the numbering of Linux: the second thread of core k is CPU count + k."""
    return tuple(
        Core(cpus=tuple(core + thread * count for thread in range(threads)), numa_node=core * numa_nodes // count)
        for core in range(count)
    )


def node(core_count: int, **others: object) -> Found:
    return replace(Found(cores=cores(core_count), memory_bytes=16 * GIB), **others)  # type: ignore[arg-type]


def test_laptop() -> None:
    planned = plan(node(2), NO_FLAGS)
    assert (planned.nnodes, planned.nproc_per_node, planned.threads_per_rank) == (1, 2, 1)
    assert planned.environment == {"OMP_NUM_THREADS": "1"}
    assert planned.torchrun[:3] == ("--standalone", "--nnodes=1", "--local-addr=127.0.0.1")
    assert planned.torchrun[-2:] == ("-m", "gpt2_ddp.train")


@pytest.mark.parametrize(
    ("core_count", "numa_nodes", "ranks", "threads"),
    [
        (1, 1, 1, 1),
        (4, 1, 2, 2),
        (12, 1, 2, 6),
        (16, 1, 2, 8),
        (8, 2, 2, 4),
        (64, 2, 8, 8),
        (96, 2, 8, 12),
        (2, 4, 2, 1),
    ],
)
def test_cpu_ranks_are_a_power_of_two_of_core_groups(
    core_count: int, numa_nodes: int, ranks: int, threads: int
) -> None:
    found = node(core_count, cores=cores(core_count, numa_nodes=numa_nodes))
    planned = plan(found, NO_FLAGS)
    assert (planned.nproc_per_node, planned.threads_per_rank) == (ranks, threads)


def test_cpu_ranks_keep_to_whole_cores_of_one_numa_node() -> None:
    found = node(16, cores=cores(16, numa_nodes=2, threads=2))
    planned = plan(found, NO_FLAGS)
    assert planned.affinity == (
        (*range(0, 8), *range(16, 24)),
        (*range(8, 16), *range(24, 32)),
    )
    assert planned.environment["GPT2_DDP_CPUS"].startswith("0,1,2,3,4,5,6,7,16")
    assert planned.torchrun[-3:] == ("-m", "launch.pinned", "gpt2_ddp.train")


def test_ranks_on_one_numa_node_are_not_pinned() -> None:
    assert plan(node(16), NO_FLAGS).affinity == ()


def test_one_t4() -> None:
    planned = plan(node(4, gpus=(T4,)), NO_FLAGS)
    assert (planned.nproc_per_node, planned.threads_per_rank, planned.affinity) == (1, 4, ())


def test_eight_a100s() -> None:
    gpus = tuple(replace(A100, numa_node=index // 4) for index in range(8))
    planned = plan(node(128, gpus=gpus, cores=cores(128, numa_nodes=2)), NO_FLAGS)
    assert (planned.nproc_per_node, planned.threads_per_rank) == (8, 8)
    assert planned.affinity[0] == tuple(range(64))
    assert planned.affinity[7] == tuple(range(64, 128))
    assert plan(node(128, gpus=(A100,) * 8), NO_FLAGS).affinity == ()


def test_more_ranks_than_gpus_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"--nproc-per-node 3, .* 2 GPUs: ask for 2, .* --device cpu .* --cpu$"):
        plan(node(8, gpus=(T4, T4)), LaunchFlags(nproc_per_node=3))


def test_cpu_flag_hides_the_gpus() -> None:
    planned = plan(node(16, gpus=(T4,)), LaunchFlags(cpu=True))
    assert planned.nproc_per_node == 2
    assert planned.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_trainer_that_would_find_metal_is_told_of_the_cpu_flag() -> None:
    mac = node(8, has_metal=True)
    asked = LaunchFlags(cpu=True, nproc_per_node=1, trainer=("--max-steps", "3"))
    assert plan(mac, asked).torchrun[-4:] == ("gpt2_ddp.train", "--device=cpu", "--max-steps", "3")
    assert plan(mac, replace(asked, module="train_gpt2.py")).torchrun[-4:-2] == ("train_gpt2.py", "--device=cpu")
    others = (
        (mac, replace(asked, cpu=False)),
        (mac, replace(asked, trainer=("--device=mps",))),
        (mac, replace(asked, module="toy.py")),
        (node(8), asked),
    )
    for found, flags in others:
        assert plan(found, flags).torchrun[-len(flags.trainer) - 1 :] == (flags.module, *flags.trainer)


def test_a_gpu_that_pytorch_cannot_use_is_refused_unless_the_cpu_is_asked_for() -> None:
    found = node(16, unused_gpu="the driver is too old")
    for trainer in ((), ("--device", "auto"), ("--device=cpu", "--device=auto"), ("--data-dir", "cpu")):
        with pytest.raises(ValueError, match=r"the driver is too old; .* --device cpu .* --cpu$"):
            plan(found, LaunchFlags(trainer=trainer))
    # What a file of flags says of the device the trainer reads, and refuses itself.
    for trainer in (("--device", "cpu"), ("--device=cuda", "--device=cpu"), ("--config", "cpu.toml"), ("--config=c",)):
        assert plan(found, LaunchFlags(trainer=trainer)).nproc_per_node == 2
    assert plan(found, LaunchFlags(cpu=True)).environment["CUDA_VISIBLE_DEVICES"] == ""  # else the trainer refuses


@pytest.mark.parametrize("trainer", [("--device", "cpu"), ("--device=cuda", "--device=cpu")])
def test_a_trainer_on_the_cpu_is_planned_as_with_the_cpu_flag(trainer: tuple[str, ...]) -> None:
    found = node(16, gpus=(T4,), tcmalloc="libtcmalloc.so.4")
    asked, wanted = plan(found, LaunchFlags(trainer=trainer)), plan(found, LaunchFlags(cpu=True))
    assert asked == replace(wanted, torchrun=(*wanted.torchrun, *trainer))
    assert asked.nproc_per_node == 2
    assert plan(found, LaunchFlags(trainer=("--device=cpu", "--device=auto"))).nproc_per_node == 1


def test_two_slurm_nodes_of_eight_gpus() -> None:
    step = SlurmStep(job_id=4321, step_id="0", nodes=2, tasks=2, cpus=64, first_host="gpu03", own_host="gpu04")
    planned = plan(node(64, gpus=(A100,) * 8, slurm=step), NO_FLAGS)
    assert (planned.nnodes, planned.nproc_per_node, planned.threads_per_rank) == (2, 8, 8)
    assert planned.rendezvous == "gpu03:14321"
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=gpu03:14321", "--rdzv-id=4321.0"} <= set(
        planned.torchrun
    )
    assert "--local-addr=gpu04" in planned.torchrun
    assert "--standalone" not in planned.torchrun


def test_both_slurm_nodes_meet_at_the_same_place() -> None:
    step = SlurmStep(job_id=4321, step_id="0", nodes=2, tasks=2, cpus=64, first_host="gpu03", own_host="gpu03")
    other = replace(step, own_host="gpu04")
    first, second = (plan(node(64, slurm=each), NO_FLAGS) for each in (step, other))
    assert first.rendezvous == second.rendezvous
    beside = plan(node(64, slurm=replace(step, step_id="1")), NO_FLAGS)
    assert beside.rendezvous != first.rendezvous


def test_cpu_only_slurm_nodes_use_what_slurm_granted() -> None:
    step = SlurmStep(job_id=7, step_id="0", nodes=2, tasks=2, cpus=1, first_host="n1", own_host="n2")
    planned = plan(node(64, slurm=step), NO_FLAGS)
    assert (planned.nproc_per_node, planned.threads_per_rank, planned.affinity) == (1, 1, ())
    whole = plan(node(64, slurm=replace(step, cpus=64), cores=cores(64, numa_nodes=2)), NO_FLAGS)
    assert (whole.nproc_per_node, whole.threads_per_rank) == (8, 8)


def test_slurm_nodes_without_srun_or_with_many_tasks_are_refused() -> None:
    bare = SlurmStep(job_id=7, step_id="", nodes=2, tasks=1, cpus=1)
    with pytest.raises(ValueError, match="not an srun step"):
        plan(node(8, slurm=bare), NO_FLAGS)
    assert plan(node(8, slurm=bare), LaunchFlags(nnodes=1)).nnodes == 1
    with pytest.raises(ValueError, match="16 tasks on 2 nodes"):
        plan(node(8, slurm=replace(bare, step_id="0", tasks=16)), NO_FLAGS)


def test_container_with_fewer_cpus_than_cores() -> None:
    planned = plan(node(32, cpu_quota=2.0, cores=cores(32, numa_nodes=2)), NO_FLAGS)
    assert (planned.nproc_per_node, planned.threads_per_rank, planned.affinity) == (2, 1, ())
    assert plan(node(32, cpu_quota=0.5), NO_FLAGS).threads_per_rank == 1


def test_nodes_by_hand_need_a_place_to_meet() -> None:
    with pytest.raises(ValueError, match="--rdzv-endpoint HOST:PORT"):
        plan(node(8), LaunchFlags(nnodes=2))
    planned = plan(node(8), LaunchFlags(nnodes=2, rdzv_endpoint="box:29500", rdzv_id="mine"))
    assert {"--rdzv-endpoint=box:29500", "--rdzv-id=mine", "--nnodes=2"} <= set(planned.torchrun)


def test_ranks_inside_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="under torchrun"):
        plan(node(8, under_torchrun=True), NO_FLAGS)


def test_torchrun_gets_only_options_that_it_has() -> None:
    old = plan(node(2), NO_FLAGS).torchrun
    assert not any(argument.startswith(("--signals", "--shutdown", "--monitor")) for argument in old)
    options = frozenset({"--signals-to-handle", "--shutdown-timeout", "--monitor-interval"})
    new = plan(node(2, torchrun_options=options), NO_FLAGS).torchrun
    assert any(argument.startswith("--signals-to-handle=") and argument.endswith("SIGUSR1") for argument in new)
    assert any(re.fullmatch(r"--shutdown-timeout=\d{3,}", argument) for argument in new)


def test_command_survives_the_shell() -> None:
    flags = parse(["--module", "my trainer.py", "--", "--data-dir", "a b", "--", "x;y"])
    planned = plan(node(2), flags)
    words = shlex.split(planned.command())
    assert words[0] == "OMP_NUM_THREADS=1"
    assert words[1] == "torchrun"
    assert words[-5:] == ["my trainer.py", "--data-dir", "a b", "--", "x;y"]


def test_a_flag_may_have_underscores_but_its_value_keeps_them() -> None:
    for spelled in (["--nproc_per_node=2"], ["--nproc_per_node", "2"], ["--nproc-per-node=2"]):
        assert parse([*spelled, "--rdzv_id=my_run", "--", "--data_dir=a_b"]) == LaunchFlags(
            nproc_per_node=2, rdzv_id="my_run", trainer=("--data_dir=a_b",)
        )


def test_a_set_number_of_threads_is_kept() -> None:
    assert plan(node(8, omp_num_threads="3"), NO_FLAGS).environment["OMP_NUM_THREADS"] == "3"


def test_tcmalloc_is_for_ranks_on_the_cpu_that_have_no_library_of_the_users() -> None:
    here = node(8, tcmalloc="libtcmalloc.so.4")
    assert plan(here, NO_FLAGS).environment["LD_PRELOAD"] == "libtcmalloc.so.4"
    assert "LD_PRELOAD" not in plan(replace(here, ld_preload="libmine.so"), NO_FLAGS).environment
    assert "LD_PRELOAD" not in plan(replace(here, gpus=(T4,)), NO_FLAGS).environment
    assert plan(replace(here, gpus=(T4,)), LaunchFlags(cpu=True)).environment["LD_PRELOAD"] == "libtcmalloc.so.4"


def test_cpu_list_of_linux() -> None:
    assert discovery.parse_cpu_list("0-3,8,10-11") == [0, 1, 2, 3, 8, 10, 11]
    assert discovery.parse_cpu_list("") == []


def test_quota_of_both_control_group_versions(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert discovery.find_cpu_quota(tmp_path, "0::/job/step") is None
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert discovery.find_cpu_quota(tmp_path, "0::/job/step") == 2.5
    older = tmp_path / "v1" / "cpu"
    older.mkdir(parents=True)
    (older / "cpu.cfs_quota_us").write_text("150000\n")
    (older / "cpu.cfs_period_us").write_text("50000\n")
    assert discovery.find_cpu_quota(tmp_path / "v1", "3:cpu:/") == 3.0
    (older / "cpu.cfs_quota_us").write_text("-1\n")
    assert discovery.find_cpu_quota(tmp_path / "v1", "3:cpu:/") is None


def test_gpus_of_the_probe() -> None:
    probed = {"gpus": [{"name": "Tesla T4", "memory_bytes": 15 * GIB, "pci": [0, 255, 31]}]}
    assert discovery.parse_gpus(probed) == (T4,)
    assert discovery.parse_gpus({"gpus": [{"name": "Tesla T4", "memory_bytes": 15 * GIB, "pci": [None] * 3}]}) == (T4,)
