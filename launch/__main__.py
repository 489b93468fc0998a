"""`python -m launch [launcher flags] -- [trainer flags]`: the same line on a laptop, on GPUs and in a SLURM step."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.console import say
from launch.discovery import discover
from launch.plan import Found, LaunchFlags, LaunchPlan, plan
from launch.torchrun import TORCHRUN, run_torchrun

DESCRIPTION = """Start the trainer with torchrun: a rank for every GPU, or for every group of CPU cores; on every node
of a SLURM step. What follows -- goes to the trainer as it is."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; flags of the trainer go behind --")


def parse(argv: Sequence[str]) -> LaunchFlags:
    """The launcher's flags, and the trainer's behind the first `--`.

    Raises:
        ValueError: for a flag that the launcher does not know.
    """
    border = argv.index("--") if "--" in argv else len(argv)
    defaults = LaunchFlags()
    parser = OneLineParser(
        prog="python -m launch",
        usage="%(prog)s [launcher flags] -- [trainer flags]",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc-per-node", type=int, default=0, help="ranks on each node; 0: every GPU, or what the cores carry")
    add("--nnodes", type=int, default=0, help="nodes; 0: those of the srun step, else one")
    add("--rdzv-endpoint", default="", help="HOST:PORT where nodes meet; found by itself in a SLURM step")
    add("--rdzv-id", default=defaults.rdzv_id, help="name of the run among nodes, with --rdzv-endpoint")
    add("--max-restarts", type=int, default=defaults.max_restarts, help="restarts of all ranks after one died")
    add("--module", default=defaults.module, help="what to run: a module's name or a .py file")
    add("--cpu", action="store_true", help="leave the GPUs alone")
    add("--dry-run", action="store_true", help="print the torchrun command that would run, and end")
    own = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv[:border]]
    return LaunchFlags(**vars(parser.parse_args(own)), trainer=tuple(argv[border + 1 :]))


def summary(found: Found, planned: LaunchPlan) -> str:
    """One line: what is here, and how it is used."""
    nodes = f"{planned.nnodes} nodes meeting at {planned.rendezvous}, each " if planned.nnodes > 1 else ""
    gpus = ", ".join(f"{gpu.name} {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in found.gpus) or "no GPU"
    memory = f"{found.memory_bytes / 2**30:.0f} GiB of memory"
    ranks = f"{planned.nproc_per_node} rank(s) of {planned.threads_per_rank} thread(s)"
    preloaded = ", with tcmalloc" if "LD_PRELOAD" in planned.environment else ""
    return f"launch: {nodes}{ranks}, on {gpus}, {len(found.cores)} core(s), {memory}{preloaded}"


def require_posix(platform: str) -> None:
    """
    Raises:
        ValueError: on Windows, as `gpt2_ddp.system.cli.require_posix`.
    """
    if platform == "win32":
        raise ValueError("Windows itself has no SIGHUP and no process groups: run this in WSL (wsl --install)")


def main(argv: Sequence[str]) -> int:
    try:
        require_posix(sys.platform)
        flags = parse(argv)
        found = discover(os.environ, flags)
        planned = plan(found, flags)
    except ValueError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    if flags.dry_run:
        say(planned.command(TORCHRUN), sys.stdout)
        return 0
    # stderr: a log that is piped on stays the trainer's.
    say(summary(found, planned), sys.stderr)
    return run_torchrun(planned.torchrun, planned.environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
