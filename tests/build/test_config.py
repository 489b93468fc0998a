"""The trainer's command line (design section 7)."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from running import run

from gpt2_ddp.build.resume import differences
from gpt2_ddp.config import TrainConfig, flag
from gpt2_ddp.system.cli import parse

DEFAULTS = {
    "model": "gpt2",
    "init_from": None,
    "data_dir": Path("data/demo"),
    "out_dir": Path("runs/gpt2"),
    "dropout": 0.0,
    "sequence_length": 1024,
    "total_batch_size": 32768,
    "max_steps": 19073,
    "warmup_steps": 715,
    "max_lr": 6e-4,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "device": "auto",
    "dtype": "auto",
    "compile": "auto",
    "resume": "auto",
}
"""The values that design section 7 gives."""

ALL_FLAGS = """
    --model --init-from --data-dir --out-dir --seed --dropout --sequence-length --micro-batch-size --total-batch-size
    --max-steps --warmup-steps --max-lr --min-lr --optimizer --weight-decay --beta1 --beta2 --grad-clip --device --dtype
    --compile --log-every --val-every --val-tokens --hellaswag-every --hellaswag-data --sample-every --checkpoint-every
    --keep-checkpoints --resume
"""


def parsed(*argv: str) -> TrainConfig:
    return parse(TrainConfig, "Train.", argv)


def test_defaults_are_the_designs() -> None:
    config = parsed()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.final_lr == pytest.approx(6e-5)
    assert parsed("--max-lr", "1e-3").final_lr == pytest.approx(1e-4)
    assert parsed("--min-lr", "0").final_lr == 0


def test_both_spellings_and_the_last_one_wins() -> None:
    assert parsed("--max-steps", "7").max_steps == parsed("--max_steps", "7").max_steps == 7
    assert parsed("--max-steps=7", "--max_steps", "9").max_steps == 9
    assert parsed("--out-dir", "a b/c").out_dir == Path("a b/c")


def test_help_tells_every_flag_with_its_meaning_and_default() -> None:
    done = run([sys.executable, "-m", "gpt2_ddp.train", "--help"], env={"COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, "")
    entries = re.split(r"\n│ (?=--)", done.stdout)[1:]
    texts = {re.match(r"--([\w-]+)", entry).group(1): " ".join(entry.split()) for entry in entries}
    assert set(ALL_FLAGS.split()) <= {f"--{name}" for name in texts}
    for field in fields(TrainConfig):
        text = next(text for name, text in texts.items() if flag(field.name) in (f"--{name}", f"--no-{name}"))
        assert "(default:" in text, field.name
        words = re.sub(r"\(default:.*|--\S+|\{.*?\}|[│|]", " ", text).split()
        assert len(words) >= 2, f"{field.name} has no help"


def test_all_faults_are_told_at_once_in_one_line() -> None:
    wrong = ["--sequence-length", "2048", "--max-steps", "0", "--dropout", "1", "--warmup-steps", "-1", "--beta2", "1"]
    wrong += ["--seed", str(2**64)]
    with pytest.raises(ValueError, match="2048") as refused:
        parsed(*wrong)
    message = str(refused.value)
    assert "\n" not in message
    for phrase in (
        "--sequence-length 2048 is past the model's 1024",
        "--max-steps 0 must be at least 1",
        "--dropout 1.0 must be at least 0 and below 1",
        "--warmup-steps -1 must be 0 or a positive number",
        "--beta2 1.0",
        f"--seed {2**64} must be 0 or a positive number, less than 2^64",
    ):
        assert phrase in message


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model", "gpt3"], ["gpt3", "gpt2-medium", "gpt2-nano"]),
        (["--max-steps", "many"], ["--max-steps", "many"]),
        (["--max-step", "3"], ["--max-step", "--max-steps"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["surplus"], ["surplus"]),
        (["--max-lr", "nan"], ["--max-lr", "nan"]),
        (["--max-lr", "inf"], ["--max-lr", "inf"]),
        (["--min-lr", "-1"], ["--min-lr", "-1"]),
        (["--timeout", "nan"], ["--timeout", "nan"]),
        (["--val-tokens", "100", "--sequence-length", "128"], ["--val-tokens 100", "128"]),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(argv: list[str], told: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(told[0])) as refused:
        parsed(*argv)
    assert "\n" not in str(refused.value)
    for phrase in told:
        assert phrase in str(refused.value)


def test_the_configuration_survives_json() -> None:
    config = parsed("--out-dir", "runs/a", "--seed", "5", "--tensorboard")
    stored = json.loads(json.dumps(config.to_json()))
    assert stored["out_dir"] == "runs/a"
    assert set(stored) == {field.name for field in fields(TrainConfig)}
    assert differences(stored, config) == []


def test_only_what_makes_another_run_is_a_difference() -> None:
    saved = parsed().to_json()
    free = parsed(
        "--max-steps", "5", "--micro-batch-size", "1", "--max-lr", "1", "--dtype", "float32", "--out-dir", "b"
    )
    assert differences(saved, free) == []
    assert differences(saved | {"optimizer": "lion"}, free) == ["--optimizer is adamw, the run has lion"]
    other = ["--model", "gpt2-nano", "--seed", "1", "--sequence-length", "512", "--total-batch-size", "1024"]
    found = differences(saved, parsed(*other))
    assert found == [
        "--model is gpt2-nano, the run has gpt2",
        "--seed is 1, the run has 1337",
        "--sequence-length is 512, the run has 1024",
        "--total-batch-size is 1024, the run has 32768",
    ]
