"""`--config`: the flags of a file, and what is said of a file that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drivers import warm
from running import final_hashes

from gpt2_ddp.build.config_file import flags_of, parse_flags, values_of
from gpt2_ddp.config import TrainConfig


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def parsed(*words: str) -> TrainConfig:
    return parse_flags(words)


def test_a_file_of_flags_is_the_flags_and_those_of_the_command_line_win(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Names as the flags have them, or with underscores; the tiny trainer's own flags come later and stay."""
    file = written(
        tmp_path / "run.toml",
        'seed = 5\nweight-decay = 0.5 # a comment\ngrad_clip = 0.25\nschedule = "linear"\n'
        "activation-checkpointing = true\nmax-lr = 7e-3\nreproducible = false\n",
    )
    run = tmp_path / "run"
    warm.train(run, data_dir, "--config", str(file), "--seed", "7")
    given = ("--weight-decay", "0.5", "--grad-clip", "0.25", "--schedule", "linear", "--activation-checkpointing")
    assert final_hashes(run) == final_hashes(warm.clean_run(shared_folder, data_dir, *given, "--seed", "7"))


def test_the_config_json_of_a_run_makes_the_same_configuration(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """With a flag that was not given, and with what a file had set; the second run is its own."""
    flags = ("--dropout", "0.1", "--min-lr", "1e-3", "--optimizer", "muon")
    first = warm.clean_run(shared_folder, data_dir, *flags)
    saved = json.loads((first / "config.json").read_text())["config"]
    assert values_of(first / "config.json").keys() == saved.keys() - {"config", "resume"}  # which would be done again
    again = parsed(f"--config={first / 'config.json'}", "--model=gpt2-nano", f"--out-dir={tmp_path}").to_json()
    assert again.pop("config") == str(first / "config.json")
    assert again | {"out_dir": saved["out_dir"], "model": saved["model"], "config": None} == saved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-stepz = 3", "there is no flag max-stepz; perhaps max-steps"),
        ("qqqq = 3", "there is no flag qqqq"),
        ('config = "other.toml"', "there is no flag config"),
        ("seed = [1, 2]", "seed should be one value, is [1, 2]"),
        ("seed = ", "Invalid value"),
        ("[train]\nseed = 3", "there is no flag train"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path / "run.toml", text)
    with pytest.raises(ValueError, match=f"^{file}: ") as caught:
        parsed("--config", str(file))
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config nowhere\.toml: there is no such file"):
        parsed("--config", "nowhere.toml")
    with pytest.raises(ValueError, match="holds no configuration of a run"):
        parsed("--config", str(written(tmp_path / "config.json", "{}")))
    for text in ('seed = "many"', "seed = -1"):
        bad = written(tmp_path / "bad.toml", text)
        with pytest.raises(ValueError, match=rf"seed.* \(with the flags in {bad}\)$"):
            parsed("--config", str(bad))


def test_words_of_a_file_come_first_and_numbers_stay_exact(tmp_path: Path) -> None:
    file = written(tmp_path / "run.toml", "max-lr = 0.0018\nreproducible = true\ntensorboard = false")
    assert flags_of(file) == ["--max-lr=0.0018", "--reproducible", "--no-tensorboard"]
    both = parsed("--max-lr", "1", f"--config={file}")
    assert (both.max_lr, both.reproducible, both.tensorboard) == (1.0, True, False)
