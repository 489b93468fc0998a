"""A short soak with a fixed seed; `python tests/soak.py --help` tells of the long ones."""

from __future__ import annotations

import sys

from running import ROOT, run

SOAK = ROOT / "tests" / "soak.py"


def test_a_run_that_everything_happens_to_ends_as_the_undisturbed_one() -> None:
    done = run([sys.executable, str(SOAK), "--minutes", "0.4", "--seed", "3"], timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "all as the undisturbed one" in done.stdout
    assert "runs compared" in done.stdout
