"""Validations of a run whose data are not of a tokenizer that is known."""

from __future__ import annotations

from pathlib import Path

from drivers import warm
from running import describe, metrics, write_shards


def test_a_run_goes_on_without_bits_per_byte_and_says_why(tmp_path: Path) -> None:
    data = describe(write_shards(tmp_path / "data"), tokenizer="another")
    done = warm.train(tmp_path / "run", data, "--val-every=6", "--val-tokens=64")
    vals = metrics(tmp_path / "run", "val")
    assert [(val["step"], val["bits_per_byte"], val["tokens"]) for val in vals] == [(6, None, 64), (12, None, 64)]
    assert done.stdout.count("no bits per byte: the bytes of the tokens of 'another' are not known here\n") == 1
    assert f"step 6 | val loss: {vals[0]['val_loss']:.6f} over 64 tokens\n" in done.stdout
