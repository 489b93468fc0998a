"""`data_prep inspect`, against documents that the test made and counts on its own."""

from __future__ import annotations

import base64
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data_prep_runs import COMMAND, expected_tokens, write_jsonl
from running import ROOT, environment

from data_prep import counting, inspection
from data_prep.commands import Text
from data_prep.counting import Stream, count_split
from data_prep.readable import hardly_text
from data_prep.report import inspect
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.system.console import visible
from gpt2_ddp.system.errors import UserError

EOT = 50256
SENTENCES = [f"Sentence number {number} tells of the {number}th day of a journey. " for number in range(40)]
TEXTS = ["".join(SENTENCES[: 1 + number % 30]) + str(number) for number in range(120)]


pytestmark = pytest.mark.usefixtures("tokenized_here")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """`TEXTS` in three shards and a validation split."""
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    Text(paths=(str(source),), out=tmp_path / "data", shard_tokens=9000, val_fraction=0.1, workers=1).run()
    return tmp_path / "data"


def told(data_dir: Path, *, sequence_length: int = 32, documents: int = 2) -> str:
    return "\n".join(inspect(data_dir, sequence_length=sequence_length, documents=documents))


def refused(data_dir: Path, match: str) -> str:
    """What is told before the error."""
    seen = list[str]()
    with pytest.raises(UserError, match=match):
        seen.extend(inspect(data_dir, sequence_length=32, documents=1))
    return "\n".join(seen)


def test_counts_lengths_and_documents_of_a_directory_of_data_prep(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BLOCK_BYTES", 1000)  # documents lie across blocks as well as shards
    said = told(prepared)
    train = [token for shard in find_shards(prepared, "train") for token in shard.open().tolist()]
    val = [token for shard in find_shards(prepared, "val") for token in shard.open().tolist()]
    for split, tokens in (("train", train), ("val", val)):
        texts = [text for text in load_tokenizer().decode(tokens).split("<|endoftext|>") if text]
        lengths = [len(expected_tokens([text])) - 1 for text in texts]
        shards = find_shards(prepared, "train" if split == "train" else "val")
        windows = sum((shard.tokens - 1) // 32 for shard in shards)
        assert f"{split}: {len(tokens):,} tokens of {len(texts)} documents in {len(shards)} shard" in said
        assert f"  {windows} windows of 32 tokens; the longest document has {max(lengths)}\n" in said
        assert f"  {len(''.join(texts)):,} bytes of text" in said
        section = said.split(f"documents of {split}, in tokens:\n")[1].split("\n\n")[0]
        rows = re.findall(r"([0-9,]+) to ([0-9,]+) +([0-9,]+)  ", section)
        for low, high, count in [[int(part.replace(",", "")) for part in row] for row in rows]:
            assert count == sum(low <= length <= high for length in lengths)
        assert sum(int(count.replace(",", "")) for _, _, count in rows) == len(texts)
    assert "hashes: 4 of 4 shards have the SHA-256 that they were written with" in said
    shown = re.findall(r"\n  \| <\|endoftext\|>(Sentence[^\n]*)", said)
    assert len(shown) == 4
    for line in shown:
        assert any(text.startswith(line.removesuffix("<|endoftext|>")) for text in TEXTS)
    assert "damaged" not in said


def test_documents_that_end_with_the_mark_as_nanogpt_writes_them(tmp_path: Path) -> None:
    encoded = [load_tokenizer().encode_ordinary(text) for text in ("First words.", "Second,\nand third.")]
    ids = [token for text in encoded for token in [*text, EOT]]
    np.array(ids * 100, np.uint16).tofile(tmp_path / "train.bin")
    said = told(tmp_path, documents=1)
    assert "tokens from elsewhere" in said
    assert f"train: {len(ids) * 100:,} tokens of 200 documents in 1 shard" in said
    assert "hashes: none to compare with" in said
    assert "\n  | First words.<|endoftext|>\n" in said
    assert "warning: no validation split" in said
    assert "most documents are shorter than 16 tokens" in said


def test_a_damaged_shard_is_found_by_its_hash(prepared: Path) -> None:
    shard = prepared / "train_000001.bin"
    contents = bytearray(shard.read_bytes())
    contents[2000] ^= 1
    shard.write_bytes(contents)
    said = refused(prepared, r"data: train_000001\.bin has another SHA-256 than when it was prepared; prepare it again")
    assert "hashes: 3 of 4 shards have" in said
    assert "damaged: train_000001.bin" in said


def test_ids_past_the_vocabulary_are_told_with_the_first_place(tmp_path: Path) -> None:
    tokens = np.full(5000, 11, np.uint16)
    tokens[3000:3100] = 60000
    write_shard(tmp_path / "train_000000.bin", tokens)
    said = refused(tmp_path, "100 ids are past the vocabulary .* prepare it again")
    assert "id 60000 at position 3000 of train_000000.bin" in said
    assert "train: 5,000 tokens" in said


@pytest.mark.parametrize(
    ("texts", "warning"),
    [
        (["A short text."], "few windows: 0 of 1,024 tokens for training, and one step takes 32"),
        (["".join(SENTENCES * 40)], "train is one document of"),
        (["".join(SENTENCES)] * 50 + [base64.b64encode(bytes(range(256)) * 60).decode()] * 3, "is hardly text"),
        (["".join(SENTENCES)] * 200, "a run of default length, which would see each"),
        (["A line", "Another line", "A third line"] * 9, "most documents are shorter than 16 tokens"),
    ],
)
def test_what_hurts_is_told(texts: list[str], warning: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "train_0.bin", np.array(expected_tokens(texts), np.uint16))
    said = told(tmp_path, sequence_length=1024, documents=0)
    assert warning in said.split("warning:", 1)[1]
    write_shard(tmp_path / "val_0.bin", np.array(expected_tokens(["word " * 9]), np.uint16))
    assert "val has no window of 1,024 tokens" in told(tmp_path, sequence_length=1024, documents=0)


def test_ordinary_data_hurts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "DEFAULT_STEPS", 3)
    for split in ("train", "val"):
        tokens = expected_tokens([f"{split} {text}" for text in TEXTS[:60]])
        write_shard(tmp_path / f"{split}_0.bin", np.array(tokens * 3, np.uint16))
    said = told(tmp_path, documents=0)
    assert said.endswith("\n\nnothing was found that would hurt a run")
    assert "warning" not in said


def test_nothing_of_a_document_moves_the_terminals_cursor(tmp_path: Path) -> None:
    evil = "\x1b[2Jgone\x1b]0;title\x07 \u202eback\r over\x9b31m \u2028end\ttab"
    write_shard(tmp_path / "train_0.bin", np.array(expected_tokens([evil] * 9), np.uint16))
    said = told(tmp_path)
    assert all(character.isprintable() or character == "\n" for character in said)
    assert r"\x1b[2Jgone\x1b]0;title\x07 \u202eback\r over\x9b31m \u2028end" in said
    assert visible("plain äöü 日本語\n") == "plain äöü 日本語\n"


def test_what_is_hardly_text() -> None:
    noise = random.Random(0).randbytes(2000)

    def judged(text: str) -> bool:
        return hardly_text(text, len(load_tokenizer().encode_ordinary(text)))

    for text in (base64.b64encode(noise).decode(), noise.hex(), noise.decode("latin1"), noise.decode(errors="replace")):
        assert judged(text)
    assert judged(" ".join(str(byte / 7) for byte in noise))
    code = Path(__file__).read_text()
    for text in (
        TEXTS[29],
        code,
        "def f(x):\n\treturn x\n\n" * 40,
        "我们都是人。今天天气很好。" * 30,
        "Привет, мир. " * 30,
    ):
        assert not judged(text)
    assert not judged("7")


def test_tokens_are_read_across_shards(tmp_path: Path) -> None:
    for number, size in enumerate((5, 1, 7)):
        first = sum((5, 1, 7)[:number])
        write_shard(tmp_path / f"train_{number}.bin", np.arange(first, first + size, dtype=np.uint16))
    stream = Stream(find_shards(tmp_path, "train"))
    for start in range(14):
        assert stream.read(start, 4).tolist() == list(range(start, min(start + 4, 13)))
    assert stream.find(9, 3, 100) == 9
    assert stream.find(2, 3, 100) is None
    assert count_split(find_shards(tmp_path, "train"), eot=5, vocab_size=100).lengths[:4].tolist() == [0, 0, 2, 0]


def test_the_command(prepared: Path) -> None:
    shard = prepared / "val_000000.bin"
    contents = bytearray(shard.read_bytes())
    contents[1500] ^= 1
    shard.write_bytes(contents)
    command = [*COMMAND, "inspect", str(prepared), "--documents", "0"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {prepared}: val_000000.bin has another SHA-256 than when it was prepared; prepare it again"
    ]
    assert "damaged: val_000000.bin" in done.stdout
