"""Validations of a run whose data are not of a tokenizer that is known."""

from __future__ import annotations

from pathlib import Path

from drivers import warm
from running import describe, metrics, write_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from gpt2_ddp.data.own_tokenizer import digest_name
from gpt2_ddp.model.vocabulary import Vocabulary


def test_a_run_goes_on_without_bits_per_byte_and_says_why(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(500)} | {"</s>": 500}, unk_token="w0"))
    contents = words.to_str().encode()
    data = describe(
        write_shards(tmp_path / "data"), tokenizer=digest_name(contents), vocabulary=Vocabulary(size=501, eot=500)
    )
    (data / "tokenizer.json").write_bytes(contents)
    done = warm.train(tmp_path / "run", data, "--val-every=6", "--val-tokens=64")
    vals = metrics(tmp_path / "run", "val")
    assert [(val["step"], val["bits_per_byte"], val["tokens"]) for val in vals] == [(6, None, 64), (12, None, 64)]
    assert (
        done.stdout.count(
            "no bits per byte: tokenizer.json is not a byte-level tokenizer: the bytes of its tokens are not known\n"
        )
        == 1
    )
    assert f"step 6 | val loss: {vals[0]['val_loss']:.6f} over 64 tokens\n" in done.stdout
