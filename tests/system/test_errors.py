"""What a user got wrong is one line and status 2; a fault of the program, or of a library, keeps its traceback."""

from __future__ import annotations

import errno
import sys

import pytest
from running import run

from gpt2_ddp.system.errors import UserError, user_error

FAILING = """
import errno
from gpt2_ddp.system import cli
from gpt2_ddp.system.errors import OneRankError, UserError

def main():
    {fault}

cli.run(main)
"""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("raise UserError('--steps 0 must be\\n at least 1')", "error: --steps 0 must be at least 1\n"),
        ("raise OneRankError('rank 1 alone')", "error: rank 1 alone\n"),
        ("open('/nowhere/file')", "error: /nowhere/file: No such file or directory\n"),
        ("open('a' * 300)", f"error: {'a' * 300}: File name too long\n"),
    ],
)
def test_a_user_is_told_in_one_line(fault: str, line: str) -> None:
    done = run([sys.executable, "-c", FAILING.format(fault=fault)])
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize(
    "fault",
    [
        "raise ValueError('a bug of ours')",
        "int('x')",
        "import json; json.loads('{')",
        "raise OSError(errno.EIO, 'disk')",
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(fault: str) -> None:
    done = run([sys.executable, "-c", FAILING.format(fault=fault)])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")


def test_what_a_thread_or_a_worker_meets_is_told_apart_in_the_same_way() -> None:
    assert user_error(UserError("two\nlines")) == "two lines"
    assert user_error(ValueError("a bug")) is None
    assert user_error(OSError(errno.EIO, "disk")) is None


def test_with_a_variable_the_users_mistakes_keep_theirs_too() -> None:
    done = run([sys.executable, "-c", FAILING.format(fault="raise UserError('x')")], env={"GPT2_DDP_TRACEBACK": "1"})
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def test_one_rank_of_a_node_speaks_for_all_but_where_it_alone_knows() -> None:
    other = {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "1"}
    told = [
        run([sys.executable, "-c", FAILING.format(fault=f"raise {kind}('x')")], env=other).stderr
        for kind in ("UserError", "OneRankError")
    ]
    assert told == ["", "error: x\n"]
