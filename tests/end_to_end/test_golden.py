"""The numbers of commits before: every loss of small runs, and a checkpoint from before the layout was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import golden
import pytest
from drivers import warm
from running import checkpoint, metrics


@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_weights_are_those_that_are_kept(tmp_path: Path, case: str) -> None:
    done = warm.start_forked(golden.argv(tmp_path / "run", *golden.CASES[case])).wait()
    assert done.returncode == 0, done.stderr
    assert golden.compare(case, golden.told(tmp_path / "run")) == []


def test_a_run_of_an_older_commit_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The run in tests/golden/run was stopped at its tenth step by commit 2994f7a (see tests/golden/README.md)."""
    run = Path(shutil.copytree(golden.FOLDER / "run", tmp_path / "run"))
    golden.train(run, *golden.CASES["float32"])
    assert golden.compare("float32", golden.told(run)) == []
    assert [entry["step"] for entry in metrics(run)] == list(range(1, golden.STEPS + 1))
    assert checkpoint(run).name == "step_00000020"
