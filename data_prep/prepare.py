"""A source into a directory of shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from tqdm import tqdm

from gpt2_ddp.data.manifest import Manifest, read_manifest
from gpt2_ddp.data.own_tokenizer import OwnTokenizer
from gpt2_ddp.data.shards import Split
from gpt2_ddp.data.tokenizer import vocabulary_of
from gpt2_ddp.system.control_groups import cpu_quota
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file

from .output import ShardWriter, begin, committed_documents, locked
from .pool import encoded_chunks
from .sources import Source
from .split import ValidationSplit

MOST_SHARD_TOKENS = 2**31 - 1
"""A shard's header counts its tokens in an int32."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides how documents become shards; a directory has one."""

    shard_tokens: int
    val_tokens: int | None
    val_fraction: float | None

    def __post_init__(self) -> None:
        """Raise a UserError for values that cannot be."""
        if not 1 <= self.shard_tokens <= MOST_SHARD_TOKENS:
            raise UserError(f"--shard-tokens is {self.shard_tokens}, should be between 1 and {MOST_SHARD_TOKENS}")
        if self.val_tokens is not None and self.val_fraction is not None:
            raise UserError("--val-tokens and --val-fraction are both given; choose one")
        if self.val_tokens is not None and self.val_tokens < 0:
            raise UserError(f"--val-tokens is {self.val_tokens}, should be 0 or more")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}, should be from 0 to below 1")


def prepare(
    source: Source, out: Path, settings: Settings, workers: int, tokenizer: OwnTokenizer | None = None
) -> Manifest:
    """Write the shards that are missing; the same ones whatever the number of workers, and after any interruption.

    Their tokens are GPT-2's, or those of `tokenizer`, of which the directory gets a copy.

    Raises:
        UserError: for a source that cannot be read, and a directory that holds something else.
    """
    nothing: dict[Split, int] = {"train": 0, "val": 0}
    wanted = Manifest(
        source=source.name,
        revision=source.revision,
        settings=asdict(settings),
        documents=nothing,
        shards=(),
        complete=False,
        next_chunk=0,
        unfinished=nothing,
    )
    if tokenizer:
        wanted = replace(wanted, tokenizer=tokenizer.name, vocabulary=vocabulary_of(tokenizer))
    with locked(out):
        manifest = begin(out, wanted)
        if not manifest.complete:
            for name, contents in (tokenizer.files() if tokenizer else {}).items():
                replace_file(out / name, contents)
            _write(source, out, settings, workers, manifest)
    finished = read_manifest(out)
    assert finished is not None
    return finished


def chosen_workers(workers: int | None) -> int:
    """The tokenizing processes that are asked for, or the physical cores that this process may use, as far as a control
    group grants their time.

    Raises:
        UserError: where less than one is asked for.
    """
    if workers is not None:
        if workers < 1:
            raise UserError(f"--workers is {workers}, should be 1 or more")
        return workers
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed, int(cpu_quota() or physical)))


@contextlib.contextmanager
def _disk_errors_named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # that of a full disk does not say which
        error.filename = error.filename or str(out)
        raise


def _write(source: Source, out: Path, settings: Settings, workers: int, manifest: Manifest) -> None:
    validation = ValidationSplit(
        tokens=settings.val_tokens,
        fraction=settings.val_fraction or 0.0,
        trained=committed_documents(out, manifest, "train"),
        taken=committed_documents(out, manifest, "val"),
    )
    own = None if manifest.tokenizer == "gpt2" else out
    writer = ShardWriter(out, manifest, settings.shard_tokens, validation)
    if manifest.next_chunk:
        there = sum(record.tokens for record in manifest.shards) + sum(manifest.unfinished.values())
        print(f"going on after the {there:,} tokens that are in {out}")
    without_text = 0
    with tqdm(unit=" tokens", unit_scale=True, desc=f"{workers} processes") as bar:
        for chunk in encoded_chunks(source, manifest.next_chunk, workers, own):
            with _disk_errors_named(out):
                writer.write(chunk)
            bar.update(len(chunk.tokens))
            without_text += chunk.without_text
    with _disk_errors_named(out):
        writer.finish()
    print(f"tokenized {bar.n:,} tokens in {bar.format_dict['elapsed']:.1f} s")
    if without_text:
        print(f"left out: {without_text:,} documents without text")
    if (settings.val_tokens or settings.val_fraction) and not writer.manifest.documents["val"]:
        print("too little text for a validation split: all of it is training data")
