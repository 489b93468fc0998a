"""What of a data directory is damaged, and what of it will hurt a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import Manifest
from gpt2_ddp.data.shards import Shard, Split
from gpt2_ddp.data.tokenizer import Tokenizer, token_bytes
from gpt2_ddp.system.errors import UserError

from .counting import SplitCount, Stream, count_split
from .readable import hardly_text
from .samples import decode

DEFAULT_STEP, DEFAULT_STEPS = 32_768, 19_073
"""Tokens in a step, and steps, of a run that is told nothing else."""
PASSES = 4
"""So often data may be seen almost like new (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""
SAMPLES, SAMPLE_TOKENS = 400, 512
"""At most so many places of a split, evenly spaced, at which it is judged, and how much of it there."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One split, counted and sampled."""

    split: Split
    shards: Sequence[Shard]
    count: SplitCount
    text_bytes: int | None
    """None where the tokenizer does not tell."""
    windows: int
    hardly_text: float
    """The share of it, 0 to 1, that is hardly text."""


def inspect_split(data_dir: Path, split: Split, tokenizer: Tokenizer, sequence_length: int) -> Inspected:
    """
    Raises:
        UserError: where the trainer would refuse the shards.
    """
    shards = find_shards(data_dir, split)
    count = count_split(shards, eot=tokenizer.eot_token, vocab_size=tokenizer.n_vocab)
    return Inspected(
        split=split,
        shards=shards,
        count=count,
        text_bytes=_text_bytes(count, tokenizer),
        windows=sum(max(0, shard.tokens - 1) // sequence_length for shard in shards),
        hardly_text=_share_of_no_text(Stream(shards), tokenizer),
    )


def _text_bytes(count: SplitCount, tokenizer: Tokenizer) -> int | None:
    try:
        return int(count.ids @ token_bytes(tokenizer, len(count.ids)))
    except UserError:  # it is not byte-level
        return None


def _share_of_no_text(stream: Stream, tokenizer: Tokenizer) -> float:
    judged = no_text = 0
    places = min(SAMPLES, -(-len(stream) // SAMPLE_TOKENS))
    for number in range(places):
        tokens = stream.read(len(stream) * number // places, SAMPLE_TOKENS)
        for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token)):
            judged += len(part)
            no_text += len(part) * hardly_text(decode(tokenizer, part[part != tokenizer.eot_token]), len(part))
    return no_text / max(1, judged)


def damage(inspected: Sequence[Inspected], manifest: Manifest | None) -> list[str]:
    """What is not as it was written."""
    found = []
    listed = {record.name: record.sha256 for record in manifest.shards} if manifest else {}
    for split in inspected:
        count = split.count
        found += [
            f"{name} has another SHA-256 than when it was prepared"
            for name, digest in count.sha256.items()
            if listed and listed[name] != digest
        ]
        if manifest and manifest.documents[split.split] != count.documents:
            said = manifest.documents[split.split]
            found.append(f"{split.split}: {said:,} documents by the manifest, {count.documents:,} here")
        if count.strangers:
            found.append(
                f"{split.split}: {count.strangers:,} ids are past the vocabulary "
                f"({count.strangers / count.tokens:.1%}, the first is {count.first_stranger}): they are ids of another "
                "tokenizer, or no ids of 16 bits"
            )
    return found


def harm(inspected: Sequence[Inspected], sequence_length: int) -> list[str]:
    """What will hurt a run, with a mend each."""
    train = inspected[0]
    found = []
    step = max(1, DEFAULT_STEP // sequence_length)
    if train.windows < step:
        found.append(
            f"few windows: {train.windows} of {sequence_length:,} tokens for training, and one step takes {step} by "
            "default; prepare more text, or train with a smaller --total-batch-size or --sequence-length"
        )
    elif (passes := DEFAULT_STEP * DEFAULT_STEPS / train.count.tokens) > PASSES:
        most = max(1, PASSES * train.count.tokens // DEFAULT_STEP)
        found.append(
            f"few tokens for a run of default length, which would see each {passes:,.0f} times; up to {PASSES} times "
            f"is almost as good as new text (--max-steps {most}), more will be learnt by heart"
        )
    if len(inspected) < len(get_args(Split)):
        found.append("no validation split: a run cannot tell learning from learning by heart")
    elif not inspected[1].windows:
        found.append(f"val has no window of {sequence_length:,} tokens: prepare with a larger --val-fraction")
    return found + [line for split in inspected for line in _harm_of_split(split)]


def _harm_of_split(split: Inspected) -> Iterator[str]:
    count = split.count
    if count.documents == 1 and count.tokens > 2:
        how = "give one file, or one line of .jsonl, per document"
        yield f"{split.split} is one document of {count.longest:,} tokens: nothing tells where a text begins; {how}"
    elif count.documents and int(count.lengths[:4].sum()) * 2 > count.documents:
        yield (
            f"{split.split}: most documents are shorter than 16 tokens; is each line of a text a document of its own? "
            "Join what belongs together"
        )
    if split.hardly_text > 0.05:
        yield (
            f"{split.split}: about {split.hardly_text:.0%} is hardly text (control characters, broken UTF-8, "
            "numbers, encoded binary); leave out the documents that are none"
        )
