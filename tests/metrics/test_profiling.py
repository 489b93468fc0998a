"""What --profile-steps writes, read back as Perfetto does; and that it changes nothing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from drivers import warm
from running import final_hashes, metrics

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.metrics.profiling import StepProfiler

PARTS = ("data", "forward", "backward", "reduction", "update")


def parts(trace: Path) -> tuple[Counter[str], list[dict[str, object]]]:
    """How often each part is in the trace, and all events with a beginning and an end."""
    events = [e for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if e.get("ph") == "X"]
    return Counter(e["name"] for e in events if e["name"] in PARTS and e["cat"] == "user_annotation"), events


def test_the_steps_and_their_parts_are_in_the_trace_of_each_rank(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Steps 3 and 4, of two micro-steps on each of two ranks."""
    done = warm.fork_ranks(2, tmp_path, data_dir, "--profile-steps", "3:4")
    for rank in (0, 1):
        found, events = parts(tmp_path / "profile" / f"rank{rank}.json.gz")
        assert found == {"data": 2, "forward": 4, "backward": 4, "reduction": 2, "update": 2}
        assert sum("AdamW" in str(event["name"]) for event in events) == 2
    assert done.stdout.count("Self CPU time total") == 1
    assert f"trace in {tmp_path}/profile/rank0.json.gz" in done.stdout
    assert final_hashes(tmp_path) == final_hashes(warm.clean_run(shared_folder, data_dir, nproc=2))


def test_a_run_that_ends_within_the_steps_writes_those_that_were(data_dir: Path, tmp_path: Path) -> None:
    warm.train(tmp_path, data_dir, "--profile-steps", "12:99", "--total-batch-size", "16")
    assert parts(tmp_path / "profile" / "rank0.json.gz")[0]["forward"] == 1


def test_a_trace_is_written_beside_the_steps(data_dir: Path, tmp_path: Path) -> None:
    warm.train(tmp_path, data_dir, "--profile-steps", "3:4", faults={"slow_trace": {"seconds": 5}})
    assert max(entry["step_ms"] for entry in metrics(tmp_path)) < 5000


def test_without_the_flag_there_is_no_trace(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    """Nor a call of PyTorch's for each part of a step."""
    assert not (warm.clean_run(shared_folder, data_dir) / "profile").exists()
    profiler = StepProfiler(range(0), tmp_path, rank=0, device=torch.device("cpu"))
    assert isinstance(profiler.region("forward"), nullcontext)


@pytest.mark.parametrize("bad", ["3", "0:2", "4:3", "a:b", "3:4:5", ":", "-1:2", ""])
def test_other_than_two_steps_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"--profile-steps .* must be two steps A:B"):
        TrainConfig(profile_steps=bad)
