"""The search for a micro-batch: what is reckoned, and what is tried out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast
from unittest.mock import MagicMock

import pytest
import torch
from drivers import warm
from running import final_hashes
from torch import nn

from gpt2_ddp.build import build_run
from gpt2_ddp.build.compiling import compiled_or_not
from gpt2_ddp.build.micro_batch import (
    Trial,
    choose_micro_batch,
    first_running,
    largest_fitting,
    micro_batches,
    require_fit,
    settle_micro_batch,
)
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.memory import training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim.rule import AdamW
from gpt2_ddp.system.precision import Precision

WIDE = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=512)
ADAMW = AdamW(weight_decay=0.1, beta1=0.9, beta2=0.95)


def test_the_largest_that_fits_is_a_power_of_two_that_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = Precision.of(torch.float32, torch.device("cpu"))

    def chosen(room_for: int, sequences_per_step: int, beyond: int = 2, sums: int = 0, **how: bool) -> int:
        needed = training_memory(
            WIDE,
            micro_batch_size=room_for,
            sequence_length=64,
            dtype=torch.float32,
            device_type="cpu",
            state_bytes=ADAMW.state_bytes(WIDE) + sums * 4 * parameter_count(WIDE),
        )
        free = needed.total / 0.5 + beyond
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free, "total": free}))
        return choose_micro_batch(
            WIDE, precision, DistContext(), ADAMW, sequences_per_step=sequences_per_step, sequence_length=64, **how
        )

    assert chosen(1, 64) == 1
    assert chosen(7, 64) == 4
    assert chosen(8, 64, beyond=-2) == 4
    assert chosen(8, 64) == 8
    assert chosen(1000, 64) == 64
    assert chosen(1000, 24) == 8
    with pytest.raises(ValueError, match="not one sequence fits"):
        chosen(1, 64, beyond=-2)
    # The tree of eight micro-steps holds three sums of gradients, that of smaller and more micro-steps more.
    assert chosen(8, 64, sums=3, reproducible=True) == 8
    with pytest.raises(ValueError, match="not one sequence fits"):
        chosen(8, 64, beyond=-2, sums=3, reproducible=True)


def test_where_no_micro_batch_is_reckoned_to_fit_a_trial_may_find_one_with_fewer_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of `--reproducible`, where the smallest holds the most; without it nothing smaller than one is left to try."""
    tried: list[int] = []
    trial = MagicMock()
    trial.return_value.runs = lambda size: tried.append(size) or size == 4
    monkeypatch.setattr("gpt2_ddp.build.micro_batch.Trial", trial)
    monkeypatch.setattr("gpt2_ddp.build.micro_batch.find_memory", lambda _: (0, 0))
    gpu, precision = DistContext(device=torch.device("cuda")), Precision.of(torch.float32, torch.device("cpu"))
    sizes: dict[str, Any] = {"sequences_per_step": 16, "sequence_length": 8}
    assert choose_micro_batch(WIDE, precision, gpu, ADAMW, **sizes, reproducible=True) == 4
    assert tried == [16, 8, 4]
    tried.clear()
    with pytest.raises(ValueError, match="not one sequence fits"):
        choose_micro_batch(WIDE, precision, gpu, ADAMW, **sizes)
    assert tried == [1]


def test_the_search_knows_of_the_flags_that_take_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known: list[dict[str, Any]] = []
    monkeypatch.setattr("gpt2_ddp.build.micro_batch.choose_micro_batch", lambda *_, **how: known.append(how) or 2)
    precision = Precision.of(torch.float32, torch.device("cpu"))
    for given in (False, True):
        config = TrainConfig(
            out_dir=tmp_path, micro_batch_size="auto", reproducible=given, activation_checkpointing=given
        )
        assert settle_micro_batch(config, DistContext(), precision, compiled=given).micro_batch_size == 2
        flags = {name: known[-1][name] for name in ("reproducible", "activation_checkpointing", "compiled")}
        assert flags == dict.fromkeys(flags, given)


FAKE_SHORTAGE = """
import sys
import torch
from gpt2_ddp.distributed.context import open_context
from gpt2_ddp.build.micro_batch import largest_fitting
with open_context("cpu") as context:
    state = torch.get_rng_state()
    best = largest_fitting([1, 2, 4, 8, 16], lambda size: size <= (4 if context.rank == 1 else 16), context)
    assert torch.equal(state, torch.get_rng_state())
    sys.stdout.write(f"rank {context.rank} takes {best}\\n")  # in one piece: print writes the line end apart
"""


def test_a_shortage_on_one_rank_counts_for_all(tmp_path: Path) -> None:
    script = tmp_path / "shortage.py"
    script.write_text(FAKE_SHORTAGE)
    told = warm.fork_program(str(script), nproc=2)
    assert sorted(told.stdout.split("\n"))[1:] == ["rank 0 takes 4", "rank 1 takes 4"]


def test_auto_is_the_same_run_as_its_number(tmp_path: Path, data_dir: Path, clean_run: Callable[..., Path]) -> None:
    found = tmp_path / "auto"
    warm.fork_small(found, data_dir, "--micro-batch-size=auto")
    number = json.loads((found / "config.json").read_text())["config"]["micro_batch_size"]
    assert number == 8  # all sequences of a step
    assert final_hashes(found) == final_hashes(clean_run(f"--micro-batch-size={number}"))
    warm.fork_small(found, data_dir, "--micro-batch-size=auto", "--max-steps=21", nproc=2)
    assert json.loads((found / "config.json").read_text())["config"]["micro_batch_size"] == 4


def test_a_model_that_no_micro_batch_helps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = type("Properties", (), {"total_memory": 15 * 2**30})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: t4)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    require_fit(SIZES["gpt2-large"], ADAMW.state_bytes(SIZES["gpt2-large"]), torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"5\.8 GiB of weights.*are 23\.2 GiB, and Tesla T4 has 15\.0 GiB"):
        require_fit(SIZES["gpt2-xl"], ADAMW.state_bytes(SIZES["gpt2-xl"]), torch.device("cuda", 0))
    require_fit(SIZES["gpt2-xl"], ADAMW.state_bytes(SIZES["gpt2-xl"]), torch.device("cpu"))


def test_all_are_reckoned_and_none_is_run_below_the_first_that_runs() -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return 1 < size < 4

    assert largest_fitting([1, 2, 4, 8], fits, DistContext()) == 2
    assert largest_fitting([1, 4, 8], fits, DistContext()) == 0
    tried.clear()
    assert first_running([16, 8, 2, 1], fits, DistContext()) == 2
    assert tried == [16, 8, 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trial_runs_what_will_be_trained_and_leaves_nothing_behind(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of CUDA are taken over: no GPU is here to run out of memory."""
    tried: list[tuple[str, int]] = []
    held: list[int] = []
    forgotten: list[object] = []

    def fake_warm_up(module: nn.Module, plan: BatchPlan, *_: object) -> None:
        tried.append((type(module).__name__, plan.micro_batch_size))
        assert all(parameter.grad is not None for parameter in module.parameters())
        if plan.micro_batch_size > 2:
            raise torch.OutOfMemoryError

    def beside(size: int) -> int:
        held.append(size)
        return 4 // size

    monkeypatch.setattr("gpt2_ddp.build.micro_batch.warm_up", fake_warm_up)
    monkeypatch.setattr("torch.random.fork_rng", lambda _: nullcontext())
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: type("Properties", (), {"total_memory": 1000}))
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda _: 890)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", forgotten.append)
    precision, cpu = Precision.of(torch.float32, torch.device("cpu")), torch.device("cpu")
    trial = Trial(
        WIDE,
        precision,
        DistContext(),
        ADAMW,
        sequence_length=8,
        compiled=compiled,
        activation_checkpointing=False,
        beside=beside,
    )
    assert first_running([4, 2, 1], trial.runs, DistContext()) == 2
    name = "CompiledGPT" if compiled else "GPT"
    assert tried == [(name, 4), (name, 2)]
    assert forgotten == [cpu, cpu]
    assert held == [4, 2]
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda _: 901)
    assert not trial.runs(1)


def test_kernels_are_deterministic_before_a_micro_batch_is_tried_out(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS reads its workspace setting at the first matmul, and later ones would raise."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    found: list[tuple[bool, str | None]] = []

    def settle(*_: object, **__: object) -> NoReturn:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        raise ValueError("enough")

    monkeypatch.setattr("gpt2_ddp.build.settling.settle_micro_batch", settle)
    config = TrainConfig(
        model="gpt2-nano", data_dir=data_dir, out_dir=tmp_path / "run", micro_batch_size="auto", reproducible=True
    )
    try:
        with pytest.raises(ValueError, match="enough"), ExitStack() as held:
            build_run(config, DistContext(), cast(StopRequest, None), held)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [(True, ":4096:8")]


def test_a_micro_batch_that_does_not_fit_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gpt2_ddp.build.compiling.warm_up", too_much)
    plan = BatchPlan(micro_batch_size=64, sequence_length=8, total_batch_size=512)
    with pytest.raises(ValueError, match=r"micro-batch of 64 sequences does not fit .* --activation-checkpointing"):
        compiled_or_not(DistContext(), plan, Precision.of(torch.float32, torch.device("cpu")), GPT(WIDE))


def test_a_step_of_no_sequence_names_the_flag() -> None:
    with pytest.raises(
        ValueError, match="0 sequences a step do not divide by 1 ranks: choose --total-batch-size as a mul"
    ):
        micro_batches(0, 1)
