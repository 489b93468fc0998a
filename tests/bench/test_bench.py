"""The speed ladder: its rungs compute the same thing, and the command tells what it measured."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drivers import warm
from running import environment

from gpt2_ddp.bench.command import Bench, climb, for_cuda, table
from gpt2_ddp.bench.ladder import (
    Measured,
    Shapes,
    attention_rungs,
    block_attention,
    first_rung_sequences,
    fused_attention,
    ladder,
    measure,
    rung_model,
)
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import SIZES
from gpt2_ddp.system.allocator import PRELOAD, find_tcmalloc

CPU = torch.device("cpu")
TINY = Shapes(model="gpt2-nano", sequence_length=32, micro_batch_size=2, total_batch_size=128, steps=1)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]


def test_each_rung_adds_one_thing() -> None:
    for device in (CPU, torch.device("cuda")):
        rungs = [vars(rung) for rung in ladder(device)]
        for before, after in itertools.pairwise(rungs):
            assert sum(before[field] != after[field] for field in before if field != "name") == 1
    assert [rung.name for rung in ladder(torch.device("cuda"))][1] == "+ TF32"


def test_the_losses_of_the_rungs_agree() -> None:
    losses = {r.name: measure(TINY, r, DistContext())[1].loss for r in ladder(CPU) if not r.compiled}
    assert losses["+ padded vocabulary"] != losses["+ fused attention"]  # 47 logits more take part
    assert max(losses.values()) - min(losses.values()) < 2e-3


def test_both_kinds_of_attention_compute_the_same_in_blocks_or_not() -> None:
    kinds = [rung_model(TINY, rung).h[0].attn.attend for rung in attention_rungs()]
    assert kinds == [fused_attention, block_attention]
    losses = [measure(TINY, rung, DistContext())[1].loss for rung in attention_rungs()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_gpu_is_given_work_enough_to_be_judged() -> None:
    here = Bench().shapes(CPU)
    assert (here.model, here.micro_batch_size, here.total_batch_size, here.steps) == ("gpt2", 4, 32768, 2)
    a100 = Shapes(**for_cuda(vars(here), 80 * 10**9))
    assert (a100.micro_batch_size, a100.total_batch_size, a100.steps) == (16, 32768, 20)
    assert Bench(micro_batch_size=2, steps=3).shapes(CPU).micro_batch_size == 2
    with pytest.raises(ValueError, match="--repeats must be at least 1"):
        Bench(repeats=0).shapes(CPU)
    with pytest.raises(ValueError, match="--steps at least 1"):
        Bench(steps=0).shapes(CPU)


def test_the_first_rung_fits_on_a_small_gpu() -> None:
    sizes = [first_rung_sequences(SIZES["gpt2"], 1024, memory * 10**9) for memory in (8, 16, 40, 80)]
    assert sizes == [2, 4, 16, 16]


def test_a_rung_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "gpt2_ddp.bench", *FLAGS, "--rung", "+ fused attention"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    measured = Measured(**told["measured"])
    assert measured.tokens_per_sec == pytest.approx(128 / told["seconds"][0], rel=1e-3)
    assert measured.peak_memory_mb > 100
    assert "+ fused attention" in table([measured])


@pytest.mark.skipif(not find_tcmalloc(), reason="tcmalloc is not installed")
def test_the_rung_of_tcmalloc_is_measured_with_it() -> None:
    tcmalloc = ladder(CPU)[-1]
    assert (tcmalloc.name, tcmalloc.tcmalloc) == ("+ tcmalloc", True)
    bare = {key: value for key, value in environment().items() if key != PRELOAD}
    command = [sys.executable, "-m", "gpt2_ddp.bench", "--rung", "+ tcmalloc"]
    refused = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"{PRELOAD}={find_tcmalloc()}" in refused.stderr
    names = [measured.name for measured in climb(TINY, CPU, [ladder(CPU)[0], tcmalloc], 1)]
    assert names == ["float32", "+ tcmalloc"]


@pytest.mark.slow
def test_the_whole_ladder(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "ladder.json"), "--plot", str(tmp_path / "ladder.png")]
    subprocess.run(
        [sys.executable, "-m", "gpt2_ddp.bench", *FLAGS, "--repeats=1", *files], env=environment(), check=True
    )
    rungs = json.loads((tmp_path / "ladder.json").read_text())["rungs"]
    assert rungs[0]["speedup"] == 1
    for rung in rungs:
        assert rung["speedup"] == pytest.approx(rungs[0]["ms_per_step"] / rung["ms_per_step"], rel=1e-2)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--auto", "--json=ladder.json", "--plot=ladder.png"])
def test_what_one_process_does_is_refused_under_torchrun(flag: str) -> None:
    done = warm.fork_program("-m", "gpt2_ddp.bench", "--device=cpu", flag, nproc=2, status=2)
    assert "--auto, --json and --plot are for one process: leave them out under torchrun" in done.stderr
