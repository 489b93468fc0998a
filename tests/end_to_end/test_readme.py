"""The README's commands as they stand there: each is run here, or another test runs it, which is named."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_prep_runs import tokenize_here
from hellaswag_examples import examples, write_examples
from running import ROOT, describe

import data_prep.__main__
import eval.__main__
from data_prep.encoding import Encoder
from gpt2_ddp.build.config_file import parse_flags
from launch.__main__ import main as launch

README = (ROOT / "README.md").read_text()
STARTS = ("bash ", "python ", "torchrun ", "pip ", "sbatch ", ".venv/bin/python ")
HERE = {
    "python -m data_prep text FILES_OR_FOLDERS --out data/mine": "in 1 shard in data/mine",
    "python -m data_prep inspect data/mine": "documents",
    "python -m eval hellaswag --model runs/gpt2 --data data/hellaswag/hellaswag_val.jsonl --protocol completion": "acc",
    "python -m eval val-loss --model runs/gpt2 --data-dir data/fineweb-edu": "validation loss",
    'python -m eval sample --model runs/gpt2 --prompt "The meaning of" --count 3': "sample 3 of 3",
    "python -m eval plot runs/gpt2 runs/other --out curves.png": "curves.png",
    "python -m eval report runs/gpt2 runs/other --out report.html": "report.html",
}
"""What is run here, and a part of what it says."""
TAKEN = (
    "python -m launch -- --config launch/gpt2_124m_t4.toml --max-steps 1000 --warmup-steps 100",
    "python -m launch -- --config launch/gpt2_124m_one_gpu_5b.toml",
    "python -m launch -- --model gpt2 --data-dir data/mine --out-dir runs/mine",
)
"""What the launcher makes a command of that the trainer takes; it would train for days."""
ELSEWHERE = {
    "bash launch/local.sh": "launch/test_launch_local.py",
    "bash tests/run.sh": "run.sh",  # which runs this
    'pip install -e ".[offline,plot,report]"': "launch/test_launch_local.py",
    "python -m gpt2_ddp.bench --json ladder.json --plot ladder.png": "bench/test_bench.py",
    "torchrun --nproc_per_node=2 -m gpt2_ddp.bench "
    "--micro-batch-size 1 --total-batch-size 8192": "bench/test_ladder.py",
    "python -m gpt2_ddp.bench --auto": "bench/test_choices.py",
    "python -m data_prep hub NAME --config C --split S --out data/hub": "data_prep/test_hub.py",
    "python -m data_prep fineweb-edu --out data/fineweb-edu": "data_prep/test_hub.py",
    "python -m data_prep hellaswag --out data/hellaswag": "data_prep/test_hub.py",
    "python -m data_prep shakespeare --out data/shakespeare": "data_prep/test_data_prep.py",
    "python -m data_prep --help": "data_prep/test_data_prep.py",
    "torchrun --nproc_per_node=8 -m gpt2_ddp.train ...": "end_to_end/test_train.py",
    "python train_gpt2.py ...": "end_to_end/test_train.py",
    "sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 launch/slurm.sbatch "
    "--config launch/gpt2_124m_8xa100.toml": "launch/test_slurm.py",
    "bash tests/gpu.sh": "end_to_end/test_gpu_kit.py",
}
"""Where the others are run, with small models and local data in the place of downloads."""


def commands() -> set[str]:
    """Every command in the README, from its blocks and from its text, without the comment behind it."""
    blocks = re.findall(r"^```\n(.*?)^```$", README, flags=re.S | re.M)
    text = re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)
    quoted = [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", text)]
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    found = {re.sub(r"  +", " ", line.strip()) for line in [*lines, *quoted] if line.startswith(STARTS)}
    return {command for command in found if " " in command and command not in ("python -m launch --cpu",)}


def test_every_command_is_run_somewhere() -> None:
    whole = {command for command in commands() if not re.fullmatch(r"python -m [\w.]+", command)}
    assert whole == {*HERE, *TAKEN, *ELSEWHERE}
    for place in ELSEWHERE.values():
        assert (ROOT / "tests" / place).is_file(), place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clean_run: Callable[..., Path], data_dir: Path) -> Path:
    """What the README's commands name."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("gpt2", "other"):
        shutil.copytree(clean_run(), place / "runs" / name)
    shutil.copytree(data_dir, place / "data/fineweb-edu")
    describe(place / "data/fineweb-edu")
    (place / "data/hellaswag").mkdir()
    write_examples(place / "data/hellaswag/hellaswag_val.jsonl", examples(4))
    (place / "FILES_OR_FOLDERS").mkdir()
    for name in ("one", "two"):
        (place / f"FILES_OR_FOLDERS/{name}.txt").write_text(f"Text number {name}.\n" * 400)
    return place


@pytest.mark.parametrize("command", HERE)
def test_a_command_does_what_the_readme_says(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    if "data/mine" in command and not (folder / "data/mine").exists():
        tokenize_here(monkeypatch, Encoder())
        monkeypatch.setattr(sys, "argv", ["data_prep", *shlex.split(next(iter(HERE)))[3:]])
        data_prep.__main__.main()
        if command == next(iter(HERE)):
            assert HERE[command] in capsys.readouterr().out
            return
    package, *arguments = shlex.split(command)[2:]
    monkeypatch.setattr(sys, "argv", [package, *arguments])
    (data_prep if package == "data_prep" else eval).__main__.main()
    assert HERE[command] in capsys.readouterr().out
    for path in re.findall(r"--out (\S+\.\w+)", command):
        assert (folder / path).stat().st_size > 1000


@pytest.mark.parametrize("command", TAKEN)
def test_the_trainer_takes_what_the_launcher_makes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert launch(["--dry-run", "--cpu", *shlex.split(command)[3:]]) == 0
    words = shlex.split(capsys.readouterr().out)
    parse_flags(words[words.index("gpt2_ddp.train") + 1 :])
