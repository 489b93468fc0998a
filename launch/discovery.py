"""Look at this node: GPUs, physical cores, control group, SLURM, and the options of the torchrun installed here."""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from launch.plan import Core, Found, Gpu, LaunchFlags, SlurmStep, node_count

# In a process of its own: asking CUDA for a GPU's name starts the driver there, and it ends with that process.
PROBE = """
import json, torch, torch.distributed.run as run
gpus, reason = [], ""
try:
    # NVML counts the GPUs of a driver that is too old for this PyTorch as well, which then fails at the first of them.
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        bus = [getattr(of, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
        gpus.append({"name": of.name, "memory_bytes": of.total_memory, "pci": bus})
    if not gpus:
        torch.cuda.init()
except (AssertionError, RuntimeError) as error:
    gpus, reason = [], " ".join(str(error).split()) + f" (PyTorch {torch.__version__})"
options = sorted(option for action in run.get_args_parser()._actions for option in action.option_strings)
print(json.dumps({"gpus": gpus, "metal": torch.backends.mps.is_available(), "options": options, "reason": reason}))
"""
CPUS = Path("/sys/devices/system/cpu")
NUMA_NODES = Path("/sys/devices/system/node")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
PCI_DEVICES = Path("/sys/bus/pci/devices")
DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"))


def discover(environment: Mapping[str, str], flags: LaunchFlags) -> Found:
    """What this node has, for a process with these environment variables and `flags`.

    Raises:
        ValueError: where torch cannot be imported, or a SLURM node's address is needed and cannot be found.
    """
    probed = probe()
    return Found(
        gpus=parse_gpus(probed),
        has_metal=bool(probed["metal"]),
        unused_gpu=find_unused_gpu(environment, str(probed["reason"])) if not probed["gpus"] else "",
        cores=find_cores(),
        cpu_quota=find_cpu_quota(),
        memory_bytes=psutil.virtual_memory().total,
        slurm=find_slurm(environment, flags),
        torchrun_options=frozenset(map(str, probed["options"])),
        under_torchrun="TORCHELASTIC_RUN_ID" in environment,
        omp_num_threads=environment.get("OMP_NUM_THREADS", ""),
        ld_preload=environment.get("LD_PRELOAD", ""),
        tcmalloc=find_tcmalloc(),
    )


def probe() -> dict[str, list[dict[str, object]]]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"torch does not start in {sys.executable} ({reason}): bash launch/setup.sh installs it in .venv"
        )
    found: dict[str, list[dict[str, object]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse_gpus(probed: Mapping[str, list[dict[str, object]]]) -> tuple[Gpu, ...]:
    """The GPUs of the probe's answer, each with the NUMA node of its PCI slot."""
    return tuple(
        Gpu(name=str(gpu["name"]), memory_bytes=int(str(gpu["memory_bytes"])), numa_node=pci_numa_node(gpu["pci"]))
        for gpu in probed["gpus"]
    )


def find_unused_gpu(environment: Mapping[str, str], reason: str) -> str:
    """Why PyTorch, which gave `reason`, finds no GPU although an NVIDIA driver is here; empty where there is none, or
    where the user hid the GPUs. As `gpt2_ddp.system.cuda_build.why_unused`: the launcher starts any module, and imports
    none of them.
    """
    traces = [str(file) for file in DRIVER_FILES if file.exists()]
    traces += ["nvidia-smi"] * (shutil.which("nvidia-smi", path=environment.get("PATH")) is not None)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not traces or (visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip())):
        return ""
    return f"an NVIDIA driver is here ({', '.join(traces)}), but PyTorch finds no GPU: {reason or 'it says no more'}"


def pci_numa_node(pci: object) -> int:
    """The NUMA node of [domain, bus, device]; -1 where Linux does not tell."""
    if not isinstance(pci, list) or not all(isinstance(part, int) for part in pci):
        return -1
    domain, bus, device = pci
    text = read(PCI_DEVICES / f"{domain:04x}:{bus:02x}:{device:02x}.0" / "numa_node")
    return int(text) if text else -1


def find_cores() -> tuple[Core, ...]:
    """The physical cores that this process may run on."""
    if sys.platform != "linux":
        return tuple(Core(cpus=(core,)) for core in range(psutil.cpu_count(logical=False) or 1))
    numa = {
        cpu: int(node.name[4:])
        for node in sorted(NUMA_NODES.glob("node[0-9]*"))
        for cpu in parse_cpu_list(read(node / "cpulist"))
    }
    siblings: dict[tuple[str, str], list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = CPUS / f"cpu{cpu}" / "topology"
        core = read(topology / "physical_package_id"), read(topology / "core_id") or f"cpu {cpu}"
        siblings.setdefault(core, []).append(cpu)
    return tuple(Core(cpus=tuple(cpus), numa_node=numa.get(cpus[0], 0)) for cpus in siblings.values())


def parse_cpu_list(text: str) -> list[int]:
    """Linux's list format: "0-3,8" is [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def find_cpu_quota(root: Path = CONTROL_GROUPS, membership: str | None = None) -> float | None:
    """The CPUs that control groups grant (version 2, then 1), the smallest on the way up; None without a limit."""
    membership = read(Path("/proc/self/cgroup")) if membership is None else membership
    own = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), "/")
    group = root / own.strip("/")
    limits = [read(folder / "cpu.max") for folder in (group, *group.parents) if folder.is_relative_to(root)]
    limits.append(f"{read(root / 'cpu/cpu.cfs_quota_us')} {read(root / 'cpu/cpu.cfs_period_us')}")
    granted = [int(quota) / int(period) for quota, period in re.findall(r"^(\d+) (\d+)$", "\n".join(limits), re.M)]
    return min(granted, default=None)


def find_tcmalloc() -> str:
    """The name by which Linux's linker knows gperftools' tcmalloc; empty where it is not installed.

    As `gpt2_ddp.system.allocator.find_tcmalloc`: the launcher starts any module and imports none of them.
    """
    if sys.platform != "linux":
        return ""
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc") or ""


def find_slurm(environment: Mapping[str, str], flags: LaunchFlags) -> SlurmStep | None:
    """The step or the bare allocation that this process runs in."""
    if "SLURM_JOB_ID" not in environment:
        return None
    in_step = "SLURM_STEP_NUM_NODES" in environment
    prefix = "SLURM_STEP_NUM_" if in_step else "SLURM_N"
    a_task, on_node = (environment.get(f"SLURM_CPUS_{name}") for name in ("PER_TASK", "ON_NODE"))
    step = SlurmStep(
        job_id=int(environment["SLURM_JOB_ID"]),
        step_id=environment.get("SLURM_STEP_ID", "") if in_step else "",
        nodes=int(environment.get(prefix + "NODES", "1")),
        tasks=int(environment.get(prefix + "TASKS", "1")) if in_step else 1,
        # A batch script is one process, and has what all of the job's tasks on its node would have.
        cpus=int((a_task or on_node if in_step else on_node or a_task) or 0),
    )
    return with_hosts(step, environment) if meets_by_itself(step, flags) else step


def meets_by_itself(step: SlurmStep, flags: LaunchFlags) -> bool:
    """Whether the step's own hosts are the place where its nodes meet.

    Raises:
        ValueError: as `node_count`, before a host is looked up that nobody would need.
    """
    several = bool(step.step_id) and step.nodes > 1 and not flags.rdzv_endpoint
    return several and 1 < node_count(step, flags) <= step.nodes


def with_hosts(step: SlurmStep, environment: Mapping[str, str]) -> SlurmStep:
    """
    Raises:
        ValueError: where the hosts cannot be found, as in a container without scontrol or some of the variables.
    """
    try:
        first = reachable(first_host(environment["SLURM_STEP_NODELIST"]))
        return replace(step, first_host=first, own_host=reachable(environment["SLURMD_NODENAME"]))
    except (ValueError, KeyError) as error:
        what = f"{error.args[0]} is not set in here" if isinstance(error, KeyError) else error
        mend = f"--nnodes {step.nodes} --rdzv-endpoint HOST:PORT, the same on each node"
        raise ValueError(f"{what}; say where the nodes meet: {mend}") from error


def first_host(node_list: str) -> str:
    """The first of SLURM's compressed list, such as gpu[03-06,09]."""
    return scontrol("show", "hostnames", node_list).split()[0]


def reachable(node: str) -> str:
    """A name or an address of a SLURM node that resolves here, its own name first.

    Raises:
        ValueError: where none does. The local host is no stand-in: each node would train alone.
    """
    shown = scontrol("--oneliner", "show", "node", node) if not resolves(node) else ""
    known = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    for name in (node, known.get("NodeAddr", ""), known.get("NodeHostName", "")):
        if name and resolves(name):
            return name
    raise ValueError(f"no address for SLURM's node {node}: its name, NodeAddr and NodeHostName do not resolve here")


def resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"scontrol {' '.join(arguments)} fails inside a SLURM job: {error}") from error


def read(path: Path) -> str:
    """The stripped text of a file of the kernel; empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
