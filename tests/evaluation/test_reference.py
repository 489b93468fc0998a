"""Published curves beside a run: told where it matches one, and never where it does not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from drivers import warm
from running import ROOT, describe, metrics, write_shards

from data_prep import hub
from data_prep.commands import FinewebEdu
from eval.plot import read_history
from gpt2_ddp.build.config_file import values_of
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.evaluation import reference
from gpt2_ddp.evaluation.reference import OnTrack, fitting, read_references

RECIPE = {"model": "gpt2-tiny", "sequence_length": 8, "total_batch_size": 64, "max_steps": 12, "max_lr": 0.01}
CURVE = [[128, 4.0, 0.25], [512, 3.0, 0.27], [640, 2.5, 0.29]]
"""Far below what a tiny model reaches after 2 to 10 steps of 64 tokens."""


def publish(file: Path, *others: dict[str, Any], **recipe: Any) -> Path:
    """A file with a curve of tiny runs on the data "tests", and `others`; from 320 tokens on 0.1 above it is off."""
    curve = {"name": "a curve", "source": "a page", "data": ["tests"], "recipe": RECIPE | recipe, "points": CURVE}
    off = {"nats": 0.1, "from_tokens": 320}
    file.write_text(json.dumps({"clearly_off": off, "references": [curve, *[curve | other for other in others]]}))
    return file


def stood(tokens: int) -> float:
    """`CURVE`, linear in the logarithm of the tokens."""
    if tokens <= 512:
        return 4 - math.log(tokens / 128) / math.log(4)
    return 3 - 0.5 * math.log(tokens / 512) / math.log(640 / 512)


def test_a_run_that_matches_is_told_where_the_reference_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = publish(tmp_path / "reference.json"), describe(write_shards(tmp_path / "data"), source="tests")
    flags = ("--val-every=1", "--val-tokens=64", "--max-steps=12")
    said = warm.train(tmp_path / "run", data, *flags, faults={"published": {"file": str(file)}}).stdout
    assert said.count("reference for validations: a curve, a page\n") == 1
    told = {
        int(step): (value, at)
        for step, value, at in re.findall(r"step (\d+) \| val .* \| reference: (.*) at (.*)\n", said)
    }
    assert told == {step: (f"{stood(step * 64):.3f}", f"{step * 64:,} tokens") for step in range(2, 11)}
    losses = {val["step"]: val["val_loss"] for val in metrics(tmp_path / "run", "val")}
    assert list(losses) == list(range(1, 13))
    off = (
        f"step 5 | clearly off, {losses[5] - stood(320):.2f} above the reference; most often that is a loss that jumped"
    )
    assert said.count("clearly off") == said.count(off) == 1  # and not at each of the six
    monkeypatch.setattr(reference, "FILE", file)
    assert [found.name for found in read_history(tmp_path / "run").references] == ["a curve"]


@pytest.mark.parametrize("source", [None, "elsewhere"])
def test_a_run_on_other_data_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    file, data = publish(tmp_path / "reference.json"), write_shards(tmp_path / "data")
    if source:
        describe(data, source=source)
    flags = ("--val-every=6", "--val-tokens=64")
    done = warm.train(tmp_path / "run", data, *flags, faults={"published": {"file": str(file)}})
    assert "reference" not in done.stdout
    assert "clearly off" not in done.stdout
    monkeypatch.setattr(reference, "FILE", file)
    assert read_history(tmp_path / "run").references == ()


@pytest.mark.parametrize(
    "changed",
    [{"model": "gpt2-nano"}, {"total_batch_size": 128}, {"sequence_length": 16}, {"init_from": "gpt2"}],
    ids=str,
)
def test_another_model_batch_length_or_beginning_does_not_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(reference, "FILE", publish(tmp_path / "reference.json"))
    config = TrainConfig().to_json() | RECIPE
    assert fitting(config, "tests")
    assert fitting(config | changed, "tests") == ()


def test_the_nearest_rate_is_told_and_a_curve_where_that_has_only_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = {"name": "an end", "recipe": RECIPE | {"max_lr": 0.03}, "points": [[768, 2.0, 0.3]]}
    equal = {"name": "another end", "points": [[768, 2.2, 0.3]]}
    far = {"name": "a curve with a tiny rate", "recipe": RECIPE | {"max_lr": 1e-5}}
    monkeypatch.setattr(reference, "FILE", publish(tmp_path / "reference.json", end, equal, far))
    config = TrainConfig().to_json() | RECIPE
    names = {
        rate: [found.name for found in fitting(config | {"max_lr": rate}, "tests")] for rate in (0.011, 0.04, 1e-6, 0.0)
    }
    assert names.pop(0.0)[0].startswith("a curve")
    assert names == {0.011: ["a curve"], 0.04: ["an end", "a curve"], 1e-6: ["a curve with a tiny rate"]}
    track = OnTrack(fitting(config | {"max_lr": 0.04}, "tests"), config)
    assert track.beside(8, 2.9) == " | reference: 3.000 at 512 tokens (a curve)"
    assert track.beside(12, 2.0) == " | reference: 2.000 at 768 tokens (an end)"
    assert track.beside(11, 2.0) == track.beside(13, 2.0) == track.beside(1, 2.0) == ""


def test_what_is_off_is_told_of_the_flags_that_differ_once_in_ten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"warmup_steps": 700, "weight_decay": 0.1, "dropout": 0.0, "optimizer": "adamw"}
    monkeypatch.setattr(reference, "FILE", publish(tmp_path / "reference.json", **recipe))
    config = TrainConfig(max_lr=0.001, dropout=0.1).to_json() | {
        name: RECIPE[name] for name in RECIPE if name != "max_lr"
    }
    track = OnTrack(fitting(config, "tests"), config)
    assert "clearly" not in track.beside(4, 9.0) + track.beside(8, 3.09)  # too early; too near
    told = [track.beside(8, 3.25) for _ in range(21)]
    flags = "--max-lr 0.001 (the reference had 0.01), --dropout 0.1 (the reference had 0.0)"
    line = f"step 8 | clearly off, 0.25 above the reference; most often that is a flag that differs: {flags}"
    assert [text.split("\n")[1:] for text in told] == [[line] if number % 10 == 0 else [] for number in range(21)]
    longer = OnTrack(fitting(config, "tests"), config | {"max_steps": 24})  # whose rate is still high at that step
    assert longer.beside(8, 3.25) == " | reference: 3.000 at 512 tokens"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_preset_for_10_billion_tokens_matches_what_is_published(
    monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr(hub, "resolved_revision", lambda *_: "main")
    monkeypatch.setattr(hub, "opened", lambda *_, **__: SimpleNamespace(hash="main"))
    monkeypatch.setattr(hub, "rows", lambda *_, **__: rows.to_iterable_dataset() if streaming else rows)
    source = FinewebEdu(out=Path("data"), streaming=streaming).source().name
    preset = values_of(ROOT / "launch" / "gpt2_124m_8xa100.toml")
    asked = {name.replace("-", "_"): value for name, value in preset.items()}
    config = TrainConfig().to_json() | asked
    [end, curve] = fitting(config, source)
    learned = {1000: (4.168, 0.256), 2000: (3.666, 0.263), 3000: (3.514, 0.273), 5000: (3.352, 0.276),
               7500: (3.249, 0.285), 10000: (3.185, 0.291), 12500: (3.136, 0.298), 15000: (3.101, 0.304),
               19073: (3.066, 0.307)}  # fmt: skip
    for step, (loss, acc_norm) in learned.items():
        tokens = step * asked["total_batch_size"]
        assert curve.at(tokens, "val_loss") == pytest.approx(loss, abs=6e-4), step
        assert curve.at(tokens, "acc_norm") == pytest.approx(acc_norm, abs=6e-4), step
    track = OnTrack([end, curve], config)
    assert track.beside(3000, 3.52) == " | reference: 3.514 at 1.57 billion tokens (garg-aayush, rate 6e-4)"
    assert track.beside(19073, 3.01) == " | reference: 3.021 at 10.00 billion tokens (garg-aayush, rate 1.8e-3)"
    assert fitting(config | {"max_lr": 6e-4}, source) == (curve,)


def test_each_published_run_is_whole() -> None:
    for found in read_references():
        tokens = [point.tokens for point in found.points]
        assert tokens == sorted(set(tokens)), found.name
        assert all(2.5 < point.val_loss < 11 and 0.2 < point.acc_norm < 0.4 for point in found.points), found.name
        assert found.source.startswith("https://github.com/"), found.name
        assert not set(found.recipe) - set(TrainConfig().to_json()), found.name
