"""A real SLURM of two nodes of one CPU and two make-believe GPUs on this host, whole in one directory: munged,
slurmctld and two slurmds.

A job in the partition `urgent` preempts those in `all`, which have a grace period.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo")
SYSTEM_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing_parts() -> str:
    """Why no cluster can be started here; empty where it can."""
    missing = [name for name in (*DAEMONS, *COMMANDS) if not shutil.which(name, path=SYSTEM_PATH)]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs only as root: run this test as root"
    return ""


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A running cluster: `environment` makes every SLURM command talk to it."""

    directory: Path
    environment: Mapping[str, str]

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """The standard output of one SLURM command.

        Raises:
            AssertionError: where the command fails, with what it printed.
        """
        done = subprocess.run(
            command, env=dict(self.environment), cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def logs(self) -> str:
        """The daemons' logs, for a failure's message."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))


@contextmanager
def slurm_cluster(directory: Path, inherited: Mapping[str, str]) -> Iterator[SlurmCluster]:
    """Start the cluster under `directory`, wait until both nodes are idle, and end every process of it on leaving.

    Its commands and jobs get the environment `inherited`.
    """
    configuration = directory / "slurm.conf"
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for name in ("state", *NODES):
        (directory / name).mkdir()
    ports = iter(free_ports(1 + len(NODES)))
    configuration.write_text(slurm_conf(directory, next(ports), dict(zip(NODES, ports, strict=True))))
    for number in (0, 1):
        (directory / f"gpu{number}").touch()
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-1]\n")
    environment = {**inherited, "PATH": SYSTEM_PATH, "SLURM_CONF": str(configuration)}
    cluster = SlurmCluster(directory=directory, environment=environment)
    with ExitStack() as running:
        running.callback(end_leftovers, configuration)
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket"]
        munged += [f"--{name}-file={directory}/munge.{name}" for name in ("pid", "seed", "log")]
        running.enter_context(daemon(cluster, "munged", munged))
        running.enter_context(daemon(cluster, "slurmctld", ["slurmctld", "-D", "-i"]))
        for node in NODES:
            running.enter_context(daemon(cluster, node, ["slurmd", "-D", "-N", node]))
        wait_until_idle(cluster)
        yield cluster
        cluster.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")


def slurm_conf(directory: Path, controller_port: int, node_ports: Mapping[str, int]) -> str:
    host = socket.gethostname()
    nodes = "".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 Gres=gpu:2 RealMemory=1000\n"
        for name, port in node_ports.items()
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={getpass.getuser()}
AuthType=auth/munge
GresTypes=gpu
# A requeued job waits until the credential of its first start has expired.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdSpoolDir={directory}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=30
{nodes}PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes={",".join(node_ports)} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={",".join(node_ports)} MaxTime=INFINITE State=UP PriorityTier=2
"""


@contextmanager
def daemon(cluster: SlurmCluster, name: str, command: list[str]) -> Iterator[None]:
    with open(cluster.directory / f"{name}.log", "w") as log:
        running = subprocess.Popen(command, env=dict(cluster.environment), stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        running.terminate()
        try:
            running.wait(timeout=10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait_until_idle(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + 60
    shown = ""
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"],
            env=dict(cluster.environment),
            capture_output=True,
            text=True,
            check=False,
        )
        shown = done.stdout + done.stderr
        if done.stdout.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.2)
    raise AssertionError(f"the nodes do not come up: {shown}\n{cluster.logs()}")


def end_leftovers(configuration: Path) -> None:
    """Kill what the jobs left: slurmstepd and its children carry the configuration's path in their environment."""
    mark = f"SLURM_CONF={configuration}".encode()
    for process in psutil.process_iter():
        # Not psutil's environ(): slurmstepd writes its title over the beginning, and psutil then reads no further.
        with suppress(OSError, psutil.Error):
            if process.pid != os.getpid() and mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                process.kill()


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
