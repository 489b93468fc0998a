"""The subcommands: what to read, where to write, what to do next."""

from __future__ import annotations

import hashlib
import re
import shlex
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, subcommand

from gpt2_ddp.data.manifest import read_manifest
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file, require_writable

from .files import READ, UNREAD, Files
from .output import kept, require_apart, require_no_tokenizer, require_place
from .prepare import Settings, chosen_workers, prepare
from .sources import PythonTopics, Source
from .tokenizers import TrainTokenizer, found_tokenizer

# hub.py is imported where it is used: the `datasets` library takes seconds to load.

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE = "tinyshakespeare.txt"
"""Its name in the directory of its shards."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What all the commands that write shards share."""

    out: Path
    """Directory for the shards. Run the same command again after an interruption: it goes on."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard."""
    val_tokens: int | None = None
    """Validation split: the first documents, until they have this many tokens (where neither this nor --val-fraction is
    given: demo 10,000, shakespeare 30,000)."""
    val_fraction: float | None = None
    """Validation split: this fraction of the documents, chosen by a hash of their text (0.01 if nothing is said, but
    for demo and shakespeare); never the first, and the second in any case."""
    workers: int | None = None
    """Tokenizing processes; all physical cores that are granted if nothing is said. The shards do not depend on it."""

    tokenizer: str | None = None
    """Another tokenizer than GPT-2's: a tokenizer.json of the tokenizers library, the folder of one, or the name of a
    model on the hub."""

    default_val_tokens: ClassVar[int | None] = None

    def source(self) -> Source:
        """Where the documents come from."""
        raise NotImplementedError

    def run(self) -> None:
        """Write the shards and say what to do with them."""
        unsaid = self.val_tokens is None and self.val_fraction is None
        val_tokens = self.default_val_tokens if unsaid else self.val_tokens
        val_fraction = 0.01 if unsaid and val_tokens is None else self.val_fraction
        settings = Settings(shard_tokens=self.shard_tokens, val_tokens=val_tokens, val_fraction=val_fraction)
        workers = chosen_workers(self.workers)
        require_place(self.out)
        tokenizer = found_tokenizer(self.tokenizer) if self.tokenizer else None
        require_no_tokenizer(self.out, tokenizer.files() if tokenizer else ())
        manifest = prepare(self.source(), self.out, settings, workers, tokenizer)
        for split, documents in manifest.documents.items():
            shards = [record for record in manifest.shards if record.name.startswith(split)]
            tokens = sum(record.tokens for record in shards)
            count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
            print(f"{split}: {tokens:,} tokens of {documents:,} documents in {count} in {self.out}")
        print(f"next: python train_gpt2.py --data-dir {shlex.quote(str(self.out))}")


@dataclass(frozen=True, kw_only=True)
class Demo(Shards):
    """The Python language reference that ships inside Python: 139,016 tokens in 3.11, no network."""

    default_val_tokens: ClassVar[int | None] = 10_000

    def source(self) -> Source:
        return PythonTopics()


@dataclass(frozen=True, kw_only=True)
class Text(Shards):
    """Files of .txt, .jsonl and .parquet, the first two also as .gz and .zst.

    A document is a line of .jsonl, a row of .parquet, or a .txt file; a .txt file longer than 64 KiB is cut at
    blank lines into documents of about that size. Packed files are read once beforehand, to see that they are whole.
    """

    paths: Positional[tuple[str, ...]]
    """Files, folders, glob patterns, and addresses that fsspec reads: s3://bucket/folder, hf://datasets/OWNER/NAME/*."""
    text_field: str = "text"
    """Field of .jsonl and column of .parquet that holds the text."""

    def source(self) -> Source:
        if not self.paths:
            raise UserError("no file given; python -m data_prep text FILE_OR_FOLDER... --out DIR")
        files = Files(paths=self.paths, text_field=self.text_field)
        require_apart(self.out, files.inputs())
        if left_out := files.left_out():
            packed = " (unpack them first)" if any(suffix in left_out for suffix in UNREAD) else ""
            print(f"left out: {left_out}{packed}; {READ} are read")
        begun = read_manifest(self.out) if self.out.is_dir() else None
        files.check(whole=begun is None or begun.revision != files.revision)
        return files


@dataclass(frozen=True, kw_only=True)
class Hub(Shards):
    """Any data set of the Hugging Face hub, or a local directory that the `datasets` library reads."""

    dataset: Positional[str]
    """Name on the hub (OWNER/NAME) or directory."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    split: str = "train"
    """Which of its splits to read; shards for validation are taken from it."""
    revision: str | None = None
    """Branch, tag or commit; the manifest keeps the commit, with which an interrupted preparation goes on."""
    streaming: bool = False
    """Read it as it arrives, without a copy on this disk."""
    text_field: str = "text"
    """Column that holds the text."""

    def source(self) -> Source:
        from .hub import hub_source

        require_apart(self.out, local(self.dataset))
        return hub_source(
            self.dataset,
            config=self.config,
            split=self.split,
            revision=self.revision,
            streaming=self.streaming,
            text_field=self.text_field,
            begun=kept(self.out),
        )


@dataclass(frozen=True, kw_only=True)
class FinewebEdu(Hub):
    """FineWeb-Edu, by default its sample of 10 billion tokens.

    Without --streaming the download and a copy of 40 to 50 GB stay in Hugging Face's cache, HF_HOME.
    """

    dataset: str = "HuggingFaceFW/fineweb-edu"
    """Name on the hub or directory."""
    config: str | None = "sample-10BT"
    """Which sample."""


@dataclass(frozen=True, kw_only=True)
class Shakespeare(Shards):
    """Tiny Shakespeare: 1.1 MB of plays, about 338k tokens."""

    file: Path | None = None
    """The text, where it is on this disk; it is downloaded if nothing is said."""

    default_val_tokens: ClassVar[int | None] = 30_000

    def source(self) -> Source:
        path = self.file or downloaded_shakespeare(self.out)
        if path.resolve() != (self.out / SHAKESPEARE).resolve():
            require_apart(self.out, [path])
        revision = hashlib.sha256(path.read_bytes()).hexdigest()
        return Files(paths=(str(path),), text_field="text", revision=revision)


@dataclass(frozen=True, kw_only=True)
class HellaSwag:
    """HellaSwag's validation set as JSON lines, for `python -m eval hellaswag`."""

    out: Path
    """Directory for the file: hellaswag_val.jsonl, or by the name of another split."""
    dataset: str = "Rowan/hellaswag"
    """Name on the hub, or directory that the `datasets` library reads."""
    split: str = "validation"
    """Which of its splits to read."""
    revision: str | None = None
    """Branch, tag or commit."""

    def run(self) -> None:
        """Write the file and say what to do with it."""
        from .hub import write_hellaswag

        part = "val" if self.split == "validation" else re.sub(r"\W+", "_", self.split).strip("_")
        path = self.out / f"hellaswag_{part}.jsonl"
        require_writable(self.out)
        require_apart(self.out, local(self.dataset))
        count = write_hellaswag(self.dataset, split=self.split, revision=self.revision, path=path)
        print(f"{count:,} examples in {path}")
        print(f"next: python -m eval hellaswag --model gpt2 --data {shlex.quote(str(path))}")


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a directory of token shards holds: counts, whether it is whole, how it reads, and what will hurt a run.

    Any directory that the trainer takes: of data_prep, llm.c, build-nanogpt, or nanoGPT.
    """

    directory: Positional[Path]
    """Where the shards lie."""
    sequence_length: int = 1024
    """Tokens in a window of the run that you have in mind."""
    documents: int = 2
    """How many documents of each split to show."""

    def run(self) -> None:
        """Print it; a directory that is damaged is an error after all lines."""
        from .report import inspect

        if self.sequence_length < 1 or self.documents < 0:
            raise UserError("--sequence-length should be 1 or more, --documents 0 or more")
        for line in inspect(self.directory, sequence_length=self.sequence_length, documents=self.documents):
            print(line)


def local(dataset: str) -> list[Path]:
    """The directory that the `datasets` library is given, where it is none of the hub."""
    return [Path(dataset)] if Path(dataset).is_dir() else []


def downloaded_shakespeare(directory: Path) -> Path:
    """The text in `directory`, downloaded if it is not there.

    Raises:
        UserError: where there is no network, and for another text than the one known by its SHA-256.
    """
    path = directory / SHAKESPEARE
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as response:
            text = response.read(SHAKESPEARE_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"no network for {SHAKESPEARE_URL} ({error}); give the text by --file") from error
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{SHAKESPEARE_URL} is not the text that was expected; give the text by --file")
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(path, text, contested=True)
    return path


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Text, subcommand("text")]
    | Annotated[Hub, subcommand("hub")]
    | Annotated[FinewebEdu, subcommand("fineweb-edu")]
    | Annotated[Shakespeare, subcommand("shakespeare")]
    | Annotated[TrainTokenizer, subcommand("train-tokenizer")]
    | Annotated[HellaSwag, subcommand("hellaswag")]
    | Annotated[Inspect, subcommand("inspect")]
)
"""What `python -m data_prep` can do."""
