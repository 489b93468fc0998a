"""A rank that keeps to its own CPUs: `torchrun -m launch.pinned MODULE FLAGS`, with the CPUs in GPT2_DDP_CPUS."""

from __future__ import annotations

import os
import runpy
import sys

from launch.plan import AFFINITY_VARIABLE


def main() -> None:
    """Take this rank's CPUs, before any library starts its threads, and become the module."""
    shares = os.environ[AFFINITY_VARIABLE].split(";")
    cpus = {int(cpu) for cpu in shares[int(os.environ["LOCAL_RANK"])].split(",")}
    if sys.platform == "linux":
        os.sched_setaffinity(0, cpus)
    module = sys.argv.pop(1)
    if module.endswith(".py"):
        sys.argv[0] = module
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
