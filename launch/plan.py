"""What was found on this node, and the torchrun command that follows from it: a pure function."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

CORES_PER_CPU_RANK = 8
"""A rank's threads beyond this gain little: GPT-2's matrix products at small micro-batches stop scaling."""
MAX_GPU_RANK_THREADS = 8
"""A rank with a GPU uses its CPU threads for loading and saving only."""
FIRST_PORT, PORTS = 10_000, 20_000
"""Rendezvous ports end below 32768, where Linux begins to give ports out to whoever connects."""
LOOPBACK = "127.0.0.1"
AFFINITY_VARIABLE = "GPT2_DDP_CPUS"
ON_THE_CPU = "on the CPU with --device cpu among the trainer's flags, or launch's own --cpu"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SHUTDOWN_SECONDS = 600
"""How long torchrun waits after a signal before it kills: a save of 1558M with its moments writes 19 GB."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: int
    numa_node: int = -1
    """-1 where the machine does not tell."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """A physical core and those of its logical CPUs that this process may run on."""

    cpus: tuple[int, ...]
    numa_node: int = 0


@dataclass(frozen=True, kw_only=True)
class SlurmStep:
    """The `srun` step around this process, or the bare allocation where `step_id` is empty."""

    job_id: int
    step_id: str
    nodes: int
    tasks: int
    cpus: int
    """CPUs of this node that belong to the job; 0 where SLURM does not say."""
    first_host: str = ""
    """A name or address of the step's first node that resolves; looked up only where there are several nodes."""
    own_host: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The node as `launch.discovery` sees it."""

    cores: tuple[Core, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    has_metal: bool = False
    unused_gpu: str = ""
    """Why PyTorch finds no GPU although an NVIDIA driver is here."""
    cpu_quota: float | None = None
    """CPUs' worth of time that the container's control group grants; None without a limit."""
    slurm: SlurmStep | None = None
    torchrun_options: frozenset[str] = frozenset()
    under_torchrun: bool = False
    omp_num_threads: str = ""
    """OMP_NUM_THREADS as the user set it."""
    ld_preload: str = ""
    """LD_PRELOAD as the user set it."""
    tcmalloc: str = ""
    """What LD_PRELOAD takes for tcmalloc; empty where it is not installed."""


@dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """The launcher's command line. 0 and "" mean: decide from what was found."""

    nproc_per_node: int = 0
    nnodes: int = 0
    rdzv_endpoint: str = ""
    rdzv_id: str = "gpt2_ddp"
    max_restarts: int = 3
    module: str = "gpt2_ddp.train"
    cpu: bool = False
    dry_run: bool = False
    trainer: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """How the run is started on this node."""

    nnodes: int
    nproc_per_node: int
    threads_per_rank: int
    max_restarts: int
    affinity: tuple[tuple[int, ...], ...]
    """The logical CPUs of each local rank; empty where ranks may run anywhere."""
    rendezvous: str
    """host:port on which the nodes meet; empty on one node."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What is set on top of the inherited environment."""
    torchrun: tuple[str, ...]
    """torchrun's arguments, the trainer's flags included."""

    def command(self, torchrun: Sequence[str] = ("torchrun",)) -> str:
        """One shell line that starts the same run."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join([*torchrun, *self.torchrun])])


def plan(found: Found, flags: LaunchFlags) -> LaunchPlan:
    """The run that fits this node.

    Every GPU gets a rank. CPU cores are shared by a power of two of ranks, so that usual batch sizes divide: two, or
    more where that leaves each no more than about eight cores and the cores of one NUMA node.

    Raises:
        ValueError: for more ranks than GPUs, a GPU that PyTorch cannot use, ranks inside ranks, and nodes that do not
            know where to meet.
    """
    cpu = flags.cpu or trainer_flags(flags).get("--device") == "cpu"
    require_possible(found, flags, cpu=cpu)
    gpus = () if cpu else found.gpus
    cores = usable_cores(found)
    nproc = flags.nproc_per_node or len(gpus) or (1 if found.has_metal and not cpu else cpu_ranks(found))
    if gpus and nproc > len(gpus):
        few = f"--nproc-per-node {nproc}, but this node has {len(gpus)} GPUs"
        raise ValueError(f"{few}: ask for {len(gpus)}, or train {ON_THE_CPU}")
    threads = max(1, cores // nproc)
    if gpus:
        threads = min(threads, MAX_GPU_RANK_THREADS)
    if found.omp_num_threads.isdigit():
        threads = int(found.omp_num_threads)
    nnodes = node_count(found.slurm, flags)
    endpoint, run_id, local_address = rendezvous(found.slurm, flags, nnodes)
    affinity = gpu_affinity(gpus[:nproc], found.cores) if gpus else cpu_affinity(found, nproc)
    environment = {"OMP_NUM_THREADS": str(threads)}
    if cpu and (found.gpus or found.unused_gpu):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if found.tcmalloc and not gpus and not found.ld_preload:
        environment["LD_PRELOAD"] = found.tcmalloc  # why: gpt2_ddp/system/allocator.py
    if affinity:
        environment[AFFINITY_VARIABLE] = ";".join(",".join(map(str, cpus)) for cpus in affinity)
    return LaunchPlan(
        nnodes=nnodes,
        nproc_per_node=nproc,
        threads_per_rank=threads,
        max_restarts=flags.max_restarts,
        affinity=affinity,
        rendezvous=endpoint,
        environment=environment,
        torchrun=(
            *meeting_arguments(nnodes, endpoint, run_id, local_address),
            f"--nproc-per-node={nproc}",
            f"--max-restarts={flags.max_restarts}",
            *patience_arguments(found.torchrun_options),
            *script_arguments(found, flags, pinned=bool(affinity)),
        ),
    )


def trainer_flags(flags: LaunchFlags) -> Mapping[str, str]:
    """The trainer's flags, each with its last value, which wins."""
    return dict(pairwise(" ".join(flags.trainer).replace("=", " ").split()))


def require_possible(found: Found, flags: LaunchFlags, *, cpu: bool) -> None:
    """
    Raises:
        ValueError: for ranks inside ranks, negative numbers, and a GPU that PyTorch cannot use unless the run is on the
            `cpu`. Where a --config may say that it is, the trainer decides.
    """
    if found.under_torchrun:
        raise ValueError("this process already runs under torchrun: start the trainer itself, without launch")
    if min(flags.nproc_per_node, flags.nnodes, flags.max_restarts) < 0:
        raise ValueError("--nproc-per-node, --nnodes and --max-restarts must not be negative")
    if found.unused_gpu and not cpu and "--config" not in trainer_flags(flags):
        raise ValueError(f"{found.unused_gpu}; mend that, or train {ON_THE_CPU}")


def usable_cores(found: Found) -> int:
    """Physical cores' worth of computing that is ours: a container or SLURM may grant fewer than can be seen."""
    limits = [float(len(found.cores))]
    if found.cpu_quota:
        limits.append(found.cpu_quota)
    if found.slurm and found.slurm.cpus:
        limits.append(found.slurm.cpus)
    return max(1, int(min(limits)))


def cpu_ranks(found: Found) -> int:
    """How many ranks share the cores, a power of two. Measured on two cores only; on more a rule of thumb, which
    `python -m gpt2_ddp.bench --auto` compares with others."""
    cores = usable_cores(found)
    numa_nodes = len({core.numa_node for core in found.cores}) if cores == len(found.cores) else 1
    # Two ranks of one thread wait less for each other than two threads of one rank, once in a step.
    groups = min(cores, max(2, cores // CORES_PER_CPU_RANK, numa_nodes))
    return 1 << (groups.bit_length() - 1)


def cpu_affinity(found: Found, nproc: int) -> tuple[tuple[int, ...], ...]:
    """Whole cores for each rank, neighbours in the same NUMA node.

    Empty on one NUMA node, where the kernel places threads better than a fixed border that other programs do not
    respect, and where the visible cores are not all ours: two containers or jobs would be pinned to the same ones.
    """
    one_node = len({core.numa_node for core in found.cores}) == 1
    if one_node or nproc == 1 or nproc > len(found.cores) or usable_cores(found) < len(found.cores):
        return ()
    ordered = sorted(found.cores, key=lambda core: (core.numa_node, core.cpus))
    share = len(ordered) // nproc
    shares = [ordered[rank * share : (rank + 1) * share] for rank in range(nproc)]
    return tuple(tuple(sorted(cpu for core in cores for cpu in core.cpus)) for cores in shares)


def gpu_affinity(gpus: Sequence[Gpu], cores: Sequence[Core]) -> tuple[tuple[int, ...], ...]:
    """The CPUs beside each GPU; empty where there is one NUMA node or a GPU's is not known."""
    near = {
        core.numa_node: tuple(sorted(c for k in cores if k.numa_node == core.numa_node for c in k.cpus))
        for core in cores
    }
    if len(near) < 2 or any(gpu.numa_node not in near for gpu in gpus):
        return ()
    return tuple(near[gpu.numa_node] for gpu in gpus)


def node_count(slurm: SlurmStep | None, flags: LaunchFlags) -> int:
    """How many nodes take part.

    Raises:
        ValueError: where SLURM gave several nodes and this process cannot be one launcher of each.
    """
    if flags.nnodes:
        return flags.nnodes
    if slurm is None or slurm.nodes == 1 == slurm.tasks:
        return 1
    if not slurm.step_id and slurm.nodes > 1:
        raise ValueError(
            f"job {slurm.job_id} has {slurm.nodes} nodes, but this is not an srun step: start with "
            "srun --ntasks-per-node=1 python -m launch, or take this node alone with --nnodes 1"
        )
    if slurm.step_id and slurm.tasks != slurm.nodes:
        raise ValueError(
            f"srun started {slurm.tasks} tasks on {slurm.nodes} nodes: launch wants one a node, "
            "srun --ntasks-per-node=1"
        )
    return slurm.nodes


def rendezvous(slurm: SlurmStep | None, flags: LaunchFlags, nnodes: int) -> tuple[str, str, str]:
    """The endpoint, the run's id and this node's own address for a run of several nodes; empty for one.

    Raises:
        ValueError: where nobody says on which host the nodes meet. There is no default: with the local host as one,
            each node would train a model of its own.
    """
    if nnodes == 1:
        return "", "", ""
    if flags.rdzv_endpoint:
        return flags.rdzv_endpoint, flags.rdzv_id, ""
    if slurm is None or not slurm.step_id or slurm.nodes < nnodes:
        where = f"--nnodes {nnodes} outside of an srun step of as many nodes"
        raise ValueError(f"{where} needs --rdzv-endpoint HOST:PORT, the same on each")
    # Steps of one job may run side by side: each needs a port of its own.
    step = int(slurm.step_id) if slurm.step_id.isdigit() else 0
    port = FIRST_PORT + (slurm.job_id + step) % PORTS
    return f"{slurm.first_host}:{port}", f"{slurm.job_id}.{slurm.step_id}", slurm.own_host


def meeting_arguments(nnodes: int, endpoint: str, run_id: str, local_address: str) -> tuple[str, ...]:
    if nnodes == 1:
        # Else the ranks look for each other by the machine's name, which need not resolve.
        return ("--standalone", "--nnodes=1", f"--local-addr={LOOPBACK}")
    own = (f"--local-addr={local_address}",) if local_address else ()
    return (f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_id}", *own)


def patience_arguments(options: frozenset[str]) -> tuple[str, ...]:
    """A signal must leave time for a save; options that this torchrun lacks are left out."""
    wanted = {
        "--monitor-interval": "0.5",
        "--signals-to-handle": SIGNALS,
        "--shutdown-timeout": str(SHUTDOWN_SECONDS),
    }
    return tuple(f"{option}={value}" for option, value in wanted.items() if option in options)


def script_arguments(found: Found, flags: LaunchFlags, *, pinned: bool) -> tuple[str, ...]:
    """What torchrun runs, with its flags: `flags.module` is a dotted name or a path that ends in .py."""
    module = flags.module
    script = ("-m", "launch.pinned", module) if pinned else (module,) if module.endswith(".py") else ("-m", module)
    # Unlike CUDA's, a Metal GPU cannot be hidden by a variable. Another module than the trainer may have no --device.
    told = "--device" in trainer_flags(flags) or module not in (LaunchFlags.module, "train_gpt2.py")
    return (*script, *(("--device=cpu",) if flags.cpu and found.has_metal and not told else ()), *flags.trainer)
