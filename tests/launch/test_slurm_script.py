"""launch/slurm.sbatch with stand-ins for SLURM's commands: what it asks of them and of the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from running import ROOT

from launch.plan import SHUTDOWN_SECONDS

SRUN = """#!/bin/sh
sleep 0.3
echo "$*" >asked.new && mv asked.new asked
for _ in $(seq 200); do
  if [ -e runs/gpt2/stop ]; then touch stopped; exit 0; fi
  sleep 0.1
done
exit 1
"""
"""Runs until its run directory has a stop file."""


def test_a_run_is_asked_to_stop_where_its_flags_cannot_be_read_and_has_time_to_save(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "find_python.sh").write_text((ROOT / "launch" / "find_python.sh").read_text())
    for name, script in (("srun", SRUN), ("scontrol", "#!/bin/sh\n"), ("python", "#!/bin/sh\nexit 1\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_JOB_ID": "1"}
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    job = subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm.sbatch"], cwd=tmp_path, env=own | told,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "runs" / "gpt2" / "stop").exists()
    waits = [word.partition("=")[2] for word in (tmp_path / "asked").read_text().split() if word.startswith("--wait=")]
    assert int(waits[0]) > SHUTDOWN_SECONDS  # which a rank may take to save when the others have left
