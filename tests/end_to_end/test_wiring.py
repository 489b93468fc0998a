"""Correct parts wired wrongly: a run is recomputed from its flags, and each flag has a test that sees what it does."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest
from drivers import warm
from recomputed import MUON, OTHERWISE, PLAIN, assert_near, recompute
from running import ROOT, checkpoint, metrics
from safetensors.torch import load_file

from gpt2_ddp.config import TrainConfig, flag
from gpt2_ddp.model.huggingface import from_hf, load_model


@pytest.mark.parametrize(
    ("flags", "switches", "nproc"),
    [({}, [], 0), ({}, [], 2), ({}, ["--reproducible"], 0), (OTHERWISE, [], 0), (MUON, [], 2)],
    ids=["defaults", "two-ranks", "reproducible", "no-flag-at-its-default", "muon"],
)
def test_a_run_is_what_its_flags_say(
    shared_folder: Path, data_dir: Path, flags: Mapping[str, str], switches: list[str], nproc: int
) -> None:
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    run = warm.clean_run(shared_folder, data_dir, *given, *switches, nproc=nproc)
    model = load_model(checkpoint(run))
    expected = recompute(model.config, PLAIN | flags, data_dir)
    for told, line in zip(metrics(run), expected.lines, strict=True):
        for name, value in line.items():
            assert told[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert_near(from_hf(load_file(checkpoint(run) / "model.safetensors")), expected.weights)
    assert_near(load_file(checkpoint(run) / "optimizer.safetensors"), expected.moments)


def test_weights_and_biases_is_asked_for_when_told_so(data_dir: Path, tmp_path: Path) -> None:
    faults = {"missing": {"module": "wandb"}}
    done = warm.train(tmp_path / "run", data_dir, "--wandb", faults=faults, status=2)
    assert done.stderr.startswith("error: --wandb: ")
    assert done.stderr.endswith('pip install -e ".[wandb]" in the checkout\n')
    warm.train(tmp_path / "without", data_dir, "--max-steps", "1", faults=faults)


@pytest.mark.parametrize(("every", "compared"), [("0", []), ("5", [4, 5, 8, 10, 12]), ("100", [4, 8, 12])])
def test_ranks_are_compared_as_often_as_told_and_before_each_save(
    data_dir: Path, tmp_path: Path, every: str, compared: list[int]
) -> None:
    steps = tmp_path / "steps"
    watchers = {"watch_comparisons": {"listing": str(steps)}}
    warm.train(tmp_path / "run", data_dir, "--check-ranks-every", every, faults=watchers)
    assert [int(step) for step in (steps.read_text() if steps.exists() else "").split()] == compared


def test_the_model_is_the_one_that_is_named(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    tiny = load_model(checkpoint(warm.clean_run(shared_folder, data_dir))).config
    warm.train(tmp_path / "run", data_dir, "--model", "gpt2-nano", "--max-steps", "1", "--dtype", "bfloat16")
    nano = load_model(checkpoint(tmp_path / "run")).config
    assert [(shape.n_embd, shape.vocab_size, shape.block_size) for shape in (tiny, nano)] == [
        (16, 512, 64),
        (64, 50304, 1024),
    ]
    [start] = metrics(tmp_path / "run", "start")
    assert (start["dtype"], start["world_size"]) == ("torch.bfloat16", 1)


RECOMPUTED = "test_wiring.py::test_a_run_is_what_its_flags_say"
SEEN_BY = {
    **dict.fromkeys([name.replace("-", "_") for name in OTHERWISE | MUON], RECOMPUTED),
    "model": "test_wiring.py::test_the_model_is_the_one_that_is_named",
    "vocab_size": "test_own_tokenizer.py::test_rows_by_hand",
    "init_from": "test_train.py::test_starting_from_another_runs_weights",
    "data_dir": "test_hang_and_drift.py::test_other_data_on_one_rank_is_refused_at_the_start",
    "out_dir": "test_train.py::test_resume_from_a_named_checkpoint",
    "dropout": "test_reproducible.py::test_dropout_drops_and_depends_on_the_seed_and_the_place_alone",
    "device": "test_distributed.py::test_a_device_that_is_not_there_is_refused",
    "dtype": "test_wiring.py::test_the_model_is_the_one_that_is_named",
    "compile": "test_watching.py::test_the_compiled_module_only_trains",
    "activation_checkpointing": "test_train.py::test_activation_checkpointing_computes_blocks_again",
    "log_every": "test_watching.py::test_any_cadence_gives_the_same_weights",
    "val_every": "test_watching.py::test_any_cadence_gives_the_same_weights",
    "val_tokens": "test_watching.py::test_two_ranks_watch_together",
    "hellaswag_every": "test_watching.py::test_any_cadence_gives_the_same_weights",
    "hellaswag_data": "test_watching.py::test_two_ranks_watch_together",
    "hellaswag_protocol": "test_watching.py::test_two_ranks_watch_together",
    "sample_every": "test_watching.py::test_any_cadence_gives_the_same_weights",
    "noise_scale_every": "test_noise_scale.py::test_it_is_that_of_all_single_gradients_and_changes_no_bit",
    "system_every": "test_progress.py::test_a_run_says_what_runs_where_and_how_long_it_takes",
    "checkpoint_every": "test_watching.py::test_two_ranks_watch_together",
    "keep_checkpoints": "test_watching.py::test_two_ranks_watch_together",
    "skip_limit": "test_bad_steps.py::test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint",
    "spike_guard": "test_bad_steps.py::test_without_the_guard_a_spike_is_trained_on",
    "spike_limit": "test_bad_steps.py::test_it_goes_back_no_more_often_than_it_may",
    "check_ranks_every": "test_wiring.py::test_ranks_are_compared_as_often_as_told_and_before_each_save",
    "reproducible": "test_reproducible.py::test_any_number_of_ranks_gives_the_same_bits",
    "config": "test_config_file.py::test_a_file_of_flags_is_the_flags_and_those_of_the_command_line_win",
    "profile_steps": "test_profiling.py::test_the_steps_and_their_parts_are_in_the_trace_of_each_rank",
    "tensorboard": "test_watching.py::test_two_ranks_watch_together",
    "wandb": "test_wiring.py::test_weights_and_biases_is_asked_for_when_told_so",
    "resume": "test_train.py::test_resume_from_a_named_checkpoint",
    "timeout": "test_hang_and_drift.py::test_a_rank_that_others_wait_for_is_named",
}
"""Each field of `TrainConfig`, and the test that fails where the flag is not obeyed."""


def test_every_flag_has_a_test_that_sees_what_it_does() -> None:
    """A new one too: whoever adds a flag names the test here, and has seen it fail without the flag's effect."""
    assert SEEN_BY.keys() == {field.name for field in fields(TrainConfig)}
    for name, place in SEEN_BY.items():
        file, _, function = place.partition("::")
        [path] = (ROOT / "tests").rglob(file)
        text = path.read_text()
        assert function in {part.name for part in ast.parse(text).body if isinstance(part, ast.FunctionDef)}, place
        given = place == RECOMPUTED or flag(name) in text or f'"{flag(name)[2:].removesuffix("-every")}"' in text
        assert given or name in ("data_dir", "out_dir", "device"), f"{flag(name)} is not in {file}"


def test_what_is_recomputed_is_not_at_its_default() -> None:
    defaults = TrainConfig().to_json() | {"min_lr": TrainConfig(max_lr=float(OTHERWISE["max-lr"])).final_lr}
    for name, value in (MUON | OTHERWISE).items():
        default = defaults[name.replace("-", "_")]
        assert value != default if isinstance(default, str) else float(value) != float(default), name
