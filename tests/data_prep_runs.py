"""Runs `python -m data_prep` as its users do, and reads back what it wrote with nothing but NumPy and tiktoken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from running import ROOT, environment, run

from data_prep import prepare as preparing
from data_prep.commands import Shards
from data_prep.encoding import EncodedChunk, Encoder, OwnEncoder
from data_prep.sources import Source
from gpt2_ddp.data.tokenizer import load_tokenizer

NO_NETWORK = {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "HF_ENDPOINT": "https://127.0.0.1:9",
}
COMMAND = [sys.executable, "-m", "data_prep"]


def tokenize_here(monkeypatch: pytest.MonkeyPatch, encoder: Encoder | OwnEncoder) -> None:
    """From now on commands tokenize in this process, not by workers, whose start takes seconds."""

    def encoded_chunks(source: Source, first: int, _workers: int, _tokenizer: object) -> Iterator[EncodedChunk]:
        return (encoder.encode(source.documents(chunk)) for chunk in source.chunks(first))

    monkeypatch.setattr(preparing, "encoded_chunks", encoded_chunks)


def run_here(command: Shards) -> list[str]:
    """What the command writes when it runs in this process: the documents of both splits."""
    command.run()
    return texts_of(command.out, "val") + texts_of(command.out, "train")


def documents(count: int) -> list[str]:
    """Different texts of a few hundred to a few thousand words."""
    texts = [topics[name] for name in sorted(topics)]
    return [f"{number}. {texts[number % len(texts)]}" for number in range(count)]


def prepare(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it to its end; with `check`, an exit status other than 0 fails the test with what was said."""
    done = run([*COMMAND, *map(str, arguments)], env=NO_NETWORK)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def refused(*arguments: object) -> str:
    """What it says in its one line of error, with status 2."""
    done = prepare(*arguments, check=False)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and " tokens" not in line[:60]]
    lines = [line for line in lines if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def start(*arguments: object, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start it in a process group of its own, where SIGINT interrupts it, even if tests run behind a `&`."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(NO_NETWORK),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def group_is_empty(group: int) -> bool:
    """Whether no process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of what `start` started."""
    if not group_is_empty(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def split_tokens(out: Path, split: str) -> list[int]:
    """All the tokens of a split, the shards one after the other."""
    return [
        token for path in sorted(out.glob(f"{split}_*.bin")) for token in np.fromfile(path, "<u2", offset=1024).tolist()
    ]


def texts_of(out: Path, split: str) -> list[str]:
    """The documents of a split, back as text."""
    text = load_tokenizer().decode(split_tokens(out, split))
    assert not text or text.startswith("<|endoftext|>")
    return text.split("<|endoftext|>")[1:]


def expected_tokens(texts: Iterable[str]) -> list[int]:
    """What a split of these documents is, one document at a time."""
    tokenizer = load_tokenizer()
    return [token for text in texts for token in [50256, *tokenizer.encode_ordinary(text)]]


def manifest(out: Path) -> dict[str, Any]:
    """manifest.json, empty where there is none."""
    path = out / "manifest.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write_jsonl(path: Path, texts: Sequence[object]) -> Path:
    """A file of one object a line."""
    path.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    return path
