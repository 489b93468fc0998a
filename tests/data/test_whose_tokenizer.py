"""Models whose directory does not say outright whose tokens they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from drivers import warm
from running import checkpoint, describe, tree, write_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from eval.convert import Convert
from eval.sample import Sample
from eval.val_loss import ValLoss
from gpt2_ddp.data import own_tokenizer as own
from gpt2_ddp.data.own_tokenizer import digest_name
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.data.tokenizer import tokenizer_files, tokenizer_of_model
from gpt2_ddp.model.vocabulary import Vocabulary
from gpt2_ddp.system.errors import UserError


def test_gpt2s_own_files_are_gpt2s(tmp_path: Path) -> None:
    """As the hub has them: a tokenizer.json, and a tokenizer_config.json that may say nothing."""
    for name, contents in tokenizer_files().items():
        (tmp_path / name).write_bytes(contents)
    assert own.name_in(tmp_path) == "gpt2"
    transformers.AutoTokenizer.from_pretrained(tmp_path, model_type="gpt2").save_pretrained(tmp_path)
    shape = {"vocab_size": 50257, "eos_token_id": 50256}
    for settings, rows, name in (({}, 50257, "gpt2"), ({"tokenizer_class": "GPT2Tokenizer"}, 50304, "gpt2"),
                                 ({"tokenizer_class": "PreTrainedTokenizerFast"}, 50304, "sha256"),
                                 ({}, 60000, "sha256")):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": rows}))
        assert own.name_in(tmp_path).split(":")[0] == name


@pytest.mark.parametrize("rows", [50257, 50304])
def test_gpt2_of_another_language_is_not_gpt2(tmp_path: Path, rows: int) -> None:
    """Neither by its vocab.json, nor when transformers has made a tokenizer.json of that."""
    vocabulary = json.loads(tokenizer_files()["vocab.json"])
    vocabulary["hello"], vocabulary["world"] = vocabulary["world"], vocabulary["hello"]
    for name, contents in tokenizer_files().items():
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": rows, "eos_token_id": 50256}))
    for ask in (own.name_in, tokenizer_of_model):
        with pytest.raises(UserError) as refused:
            ask(tmp_path)
        assert str(refused.value) == (
            f"{tmp_path} has a vocab.json that is not GPT-2's, and no tokenizer.json of its own: save it there with "
            "transformers' AutoTokenizer"
        )
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert own.name_in(tmp_path).startswith("sha256:")
    assert tokenizer_of_model(tmp_path).encode_ordinary("hello") == [vocabulary["hello"]]


def data_of_words(folder: Path) -> Path:
    """Shards of a tokenizer of its own, which has 501 ids."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(500)} | {"</s>": 500}, unk_token="w0"))
    contents = words.to_str().encode()
    data = describe(write_shards(folder), tokenizer=digest_name(contents), vocabulary=Vocabulary(size=501, eot=500))
    (data / "tokenizer.json").write_bytes(contents)
    return data


def test_a_start_without_the_datas_tokenizer_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """Also one that was to go on from an earlier checkpoint."""
    data, out_dir = data_of_words(tmp_path / "data"), tmp_path / "run"
    flags = ("--max-steps=4", "--checkpoint-every=2")
    warm.train(out_dir, data, *flags)
    (data / "tokenizer.json").unlink()
    before = tree(out_dir)
    done = warm.train(out_dir, data, *flags, f"--resume={checkpoint(out_dir, 2)}", status=2)
    assert f"no tokenizer at {data / 'tokenizer.json'}" in done.stderr
    assert tree(out_dir) == before


def test_a_model_with_few_rows_and_no_tokenizer_is_not_read_with_gpt2s(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss on data whose own tokenizer has as many ids needs none."""
    data = data_of_words(tmp_path / "data")
    warm.train(tmp_path / "run", data, "--max-steps=1")
    bare = tmp_path / "bare"
    Convert(source=str(tmp_path / "run"), target=bare).run()
    for file in bare.glob("tokenizer*"):
        file.unlink()
    few = f"{bare} has 512 token embeddings, GPT-2's tokenizer has 50257 ids, and no tokenizer.json of its own: save it"
    flags: dict[str, Any] = {"device": "cpu", "dtype": "float32", "sequence_length": 8}
    for refused in (
        Sample(model=(str(bare),), prompt="a", **flags),
        ValLoss(model=str(bare), data_dir=describe(write_shards(tmp_path / "gpt2")), **flags),
    ):
        with pytest.raises(UserError, match=few):
            refused.run()
    for tokens in (data, data_dir):  # of which no manifest tells
        start = warm.train(tmp_path / "new", tokens, "--init-from", str(bare), status=2)
        assert start.stderr.startswith(f"error: {few}")
    ValLoss(model=str(bare), data_dir=data_dir, val_tokens=64, **flags).run()
    assert "no bits per byte: neither the model nor the data says whose tokens they are" in capsys.readouterr().err
    others = write_shards(tmp_path / "others")
    write_shard(others / "val_000000.bin", np.array([512, 513, *range(20)], np.uint16))
    with pytest.raises(UserError, match=f"{others} has the token id 513, and the model 512 token embeddings: prepare"):
        ValLoss(model=str(bare), data_dir=others, **flags).run()
    told = []
    for model in (bare, tmp_path / "run"):
        capsys.readouterr()
        ValLoss(model=str(model), data_dir=data, val_tokens=64, **flags).run()
        told.append(capsys.readouterr().out.split(": ", 1)[1])
    assert told[0] == told[1]
