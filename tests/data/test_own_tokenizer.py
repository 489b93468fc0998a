"""A tokenizer of the user's own, from his text to a checkpoint that transformers opens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from data_prep_runs import manifest, prepare, split_tokens, tokenize_here
from drivers import warm
from running import checkpoint, metrics, steps
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F

from data_prep.commands import Text
from data_prep.encoding import OwnEncoder
from data_prep.inspection import damage, inspect_split
from data_prep.tokenizers import TrainTokenizer
from eval.convert import Convert
from eval.sample import Sample
from eval.val_loss import ValLoss
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data import own_tokenizer as own
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import read_manifest
from gpt2_ddp.data.tokenizer import tokenizer_of_data, tokenizer_of_model
from gpt2_ddp.data.windows import Windows
from gpt2_ddp.evaluation.sampling import PROMPT, generate
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.model.vocabulary import Vocabulary
from gpt2_ddp.system.errors import UserError

TEXTS = [
    *(f"Der {n}. Käse ist größer als {n * 7 % 13} Ω, don't you think? 日本語 \n\n{'ha' * (n % 5)}" for n in range(120)),
    "what <|endoftext|> looks like one is text, and half a pair \ud83d is a mark",
]

LENGTH = int(warm.TINY["sequence-length"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.jsonl`, the tokenizer `tok` made of it by the command, the shards `data`, and a run on them."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare("train-tokenizer", folder / "text.jsonl", "--out", folder / "tok", "--vocab-size", 300)
    prepare(
        "text", folder / "text.jsonl", "--tokenizer", folder / "tok", "--out", folder / "data", "--val-tokens", 400,
        "--workers", 2,
    )  # fmt: skip
    flags = ("--val-every=6", "--val-tokens=256", "--sample-every=12")
    warm.train(folder / "run", folder / "data", *flags)
    return folder


def texts_of(folder: Path, split: str) -> list[str]:
    decoded = Tokenizer.from_file(str(folder / "tok/tokenizer.json")).decode(
        split_tokens(folder / "data", split), skip_special_tokens=False
    )
    return decoded.split("<|endoftext|>")


def test_the_shards_hold_the_texts_and_the_manifest_says_whose_tokens_they_are(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [token for split in ("val", "train") for token in split_tokens(scene / "data", split)]
    theirs = transformers.AutoTokenizer.from_pretrained(scene / "data")
    whole = [text.replace("\ud83d", "?") for text in TEXTS]
    assert tokens.count(0) == len(TEXTS)
    assert theirs.decode(tokens, clean_up_tokenization_spaces=False) == "".join(f"<|endoftext|>{t}" for t in whole)
    assert max(tokens) <= 299
    assert manifest(scene / "data")["vocabulary"] == {"size": 300, "eot": 0}
    assert manifest(scene / "data")["tokenizer"].startswith("sha256:")
    tokenize_here(monkeypatch, OwnEncoder(scene / "tok"))
    Text(paths=(str(scene / "text.jsonl"),), out=tmp_path, tokenizer=str(scene / "tok"), val_tokens=400).run()
    for split in ("train", "val"):  # the split is by whole documents of equal text, with any number of workers
        assert split_tokens(tmp_path, split) == split_tokens(scene / "data", split)


def test_the_model_has_a_row_for_each_token_padded_and_transformers_opens_it(scene: Path) -> None:
    path = checkpoint(scene / "run")
    model, theirs = load_model(path), transformers.GPT2LMHeadModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == theirs.config.vocab_size == 384
    assert len(tokenizer) == 300
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    ours = tokenizer_of_model(path)
    for text in TEXTS[:20]:
        assert tokenizer(text)["input_ids"] == ours.encode_ordinary(text)
        assert tokenizer.decode(ours.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
    ids = torch.tensor([ours.encode_ordinary(TEXTS[0])])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-5)


def test_samples_are_of_its_tokens(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(scene / "run")
    ours, vocabulary = tokenizer_of_model(path), Vocabulary(size=300, eot=0)
    [sample] = metrics(scene / "run", "sample")
    seed = TrainConfig.seed + 12
    prompt = ours.encode_ordinary(PROMPT)
    row = generate(
        load_model(path),
        prompt,
        max_new_tokens=48,
        top_k=50,
        seed=seed,
        sequence_length=LENGTH,
        vocabulary=vocabulary,
    )
    assert sample["text"] == ours.decode(row[0].tolist())
    assert int(row.max()) < 300
    with pytest.raises(UserError, match="tokens are 0 to 299"):
        generate(load_model(path), [300], max_new_tokens=1, vocabulary=vocabulary)
    Sample(model=(str(path),), prompt="Der 7. Käse", device="cpu", dtype="float32", temperature=0).run()
    assert "Der 7. Käse" in capsys.readouterr().out


def test_bits_per_byte_are_those_of_the_text(scene: Path, tmp_path: Path) -> None:
    ValLoss(
        model=str(scene / "run"), data_dir=scene / "data", val_tokens=256, device="cpu", dtype="float32",
        json=tmp_path / "found.json",
    ).run()  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    tokens = torch.tensor(split_tokens(scene / "data", "val"))
    model = load_model(checkpoint(scene / "run"))
    losses = []
    with torch.no_grad():
        for start in range(0, 256, LENGTH):
            logits = model(tokens[start : start + LENGTH][None])[0]
            losses.append(F.cross_entropy(logits, tokens[start + 1 : start + LENGTH + 1], reduction="none"))
    answers = tokens[1:257]
    text = Tokenizer.from_file(str(scene / "tok/tokenizer.json")).decode(answers.tolist())  # special tokens left out
    cut = sum(letter == "\ufffd" for letter in text)
    size = sum(len(piece.encode()) for piece in text if piece != "\ufffd") + cut
    bits = float(torch.cat(losses).double()[answers != 0].sum()) / math.log(2) / size
    assert found["bits_per_byte"] == pytest.approx(bits, rel=0.01 if cut else 1e-5)
    assert metrics(scene / "run", "val")[-1]["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)


def test_a_resume_goes_on(scene: Path, tmp_path: Path) -> None:
    warm.train(tmp_path / "run", scene / "data", "--max-steps=4")
    warm.train(tmp_path / "run", scene / "data", "--max-steps=8")
    assert steps(tmp_path / "run") == 8


def test_rows_by_hand(scene: Path, data_dir: Path, tmp_path: Path) -> None:
    warm.train(tmp_path / "run", scene / "data", "--vocab-size=301", "--max-steps=1")
    assert load_model(checkpoint(tmp_path / "run")).config.vocab_size == 301
    few = warm.train(tmp_path / "few", scene / "data", "--vocab-size=299", "--max-steps=1", status=2)
    assert few.stderr == f"error: --vocab-size 299: the tokens in {scene / 'data'} have 300 ids\n"
    other = warm.train(tmp_path / "run", scene / "data", "--max-steps=2", status=2)
    assert "--vocab-size is 384, the run has 301" in other.stderr
    start = warm.train(tmp_path / "new", data_dir, "--init-from", str(scene / "run"), status=2)
    assert "prepare the text with its tokenizer" in start.stderr
    with pytest.raises(UserError, match="prepare the text with its tokenizer"):
        ValLoss(model=str(scene / "run"), data_dir=data_dir, device="cpu").run()


def broken(scene: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    data = folder / "data"
    data.mkdir()
    for file in (scene / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    change(data / "tokenizer.json")
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "no tokenizer at"),
        (lambda file: file.write_text("{}"), "is no file of the tokenizers library"),
        (lambda file: file.write_text(file.read_text() + "\n"), "and the shards beside it are of sha256:"),
    ],
)
def test_a_tokenizer_that_is_not_that_of_the_shards(
    scene: Path, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    data = broken(scene, tmp_path, change)
    with pytest.raises(UserError, match=said):
        tokenizer_of_data(data)
    done = warm.train(tmp_path / "run", data, status=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_library(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.own_tokenizer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    for attempt in (
        lambda: tokenizer_of_data(scene / "data"),
        lambda: TrainTokenizer(paths=(str(scene / "text.jsonl"),), out=scene / "none").run(),
    ):
        with pytest.raises(UserError, match=r'pip install -e "\.\[tokenizers\]"'):
            attempt()


def test_what_no_tokenizer_can_be_made_of(scene: Path, tmp_path: Path) -> None:
    text = (str(scene / "text.jsonl"),)
    with pytest.raises(UserError, match="--vocab-size 65537 should be from 257 to 65536"):
        TrainTokenizer(paths=text, out=tmp_path, vocab_size=65537).run()
    with pytest.raises(UserError, match="is there already"):
        TrainTokenizer(paths=text, out=scene / "tok").run()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no document with text"):
        TrainTokenizer(paths=(str(tmp_path / "empty.txt"),), out=tmp_path / "out").run()
    monkey = Text(paths=text, out=tmp_path / "out", tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such file or folder, and nothing on the hub"):
        monkey.run()
    with pytest.raises(UserError, match="was prepared with the tokenizer 'sha256:"):
        Text(paths=text, out=scene / "data", val_tokens=400).run()


def words(count: int, end: str, *, special: bool = True) -> Tokenizer:
    made = Tokenizer(WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    if end:
        made.add_special_tokens([end]) if special else made.add_tokens([AddedToken(end)])
    return made


def test_every_id_of_sixteen_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words(65535, "</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w1 w65534 </s> w2")
    tokenize_here(monkeypatch, OwnEncoder(tmp_path))
    Text(paths=(str(tmp_path / "a.txt"),), out=tmp_path / "out", tokenizer=str(tmp_path), val_tokens=0).run()
    [shard] = find_shards(tmp_path / "out", "train")
    assert np.array(shard.open()).tolist() == [65535, 1, 65534, 0, 2]
    assert Windows([shard], 4).read(np.array([0])).tolist() == [[65535, 1, 65534, 0, 2]]
    with pytest.raises(UserError, match="token id 65535 at position 0, past the vocabulary of 65535"):
        Windows([replace(shard, vocab_size=65535)], 4).read(np.array([0]))
    words(65536, "</s>").save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(UserError, match="has 65537 ids, and shards of uint16 can hold 65536"):
        own.own_tokenizer(tmp_path / "out")


def test_a_document_without_a_token_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not every tokenizer has one for blanks; what is left is what the manifest counts."""
    words(10, "</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("w1", " \n ", "", "w2 w3"))
    )
    tokenize_here(monkeypatch, OwnEncoder(tmp_path))
    Text(paths=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", tokenizer=str(tmp_path), val_tokens=0).run()
    assert split_tokens(tmp_path / "out", "train") == [10, 1, 10, 2, 3]
    assert manifest(tmp_path / "out")["documents"] == {"train": 2, "val": 0}
    assert "left out: 2 documents without text\n" in capsys.readouterr().out
    split = inspect_split(tmp_path / "out", "train", tokenizer_of_data(tmp_path / "out"), 2)
    assert damage([split], read_manifest(tmp_path / "out")) == []


def test_what_begins_documents(tmp_path: Path) -> None:
    words(10, "").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="name its token between documents as eos_token in"):
        own.own_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w3"}}))
    tokenizer = own.own_tokenizer(tmp_path)
    assert (tokenizer.eot_token, tokenizer.end) == (3, "w3")
    assert tokenizer.encode_ordinary("w4 w5") == [4, 5]
    with pytest.raises(UserError, match=r"'w3' of tokenizer\.json occurs in a text"):
        tokenizer.encode_ordinary("w2 w3")


def test_convert_keeps_it(scene: Path, tmp_path: Path) -> None:
    Convert(source=str(scene / "run"), target=tmp_path / "hf").run()
    assert own.name_in(tmp_path / "hf") == manifest(scene / "data")["tokenizer"]
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 0
    assert tokenizer_of_model(tmp_path / "hf").encode_ordinary(TEXTS[0])


def test_what_is_not_byte_level_shows_its_tokens_one_by_one(tmp_path: Path) -> None:
    words(10, "</s>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = own.own_tokenizer(tmp_path)
    ids = tokenizer.encode_ordinary("w4 w5 w6")
    assert tokenizer.decode_bytes(ids) == b"w4 w5 w6"
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == b" w4 w5 w6"
    with pytest.raises(UserError, match="is not a byte-level tokenizer"):
        tokenizer.decode_single_token_bytes(4)
