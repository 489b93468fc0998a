"""The data directories that a run reads: one, or several with their weights in a mixture."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from gpt2_ddp.data.manifest import Manifest, read_manifest
from gpt2_ddp.system.errors import UserError

DataDir = Path | tuple[str, ...]
"""One folder of token shards; or several, each as PATH:WEIGHT."""
METAVAR = "PATH | PATH:WEIGHT PATH:WEIGHT ..."
WEIGHT = r"\d{1,9}(\.\d{0,9})?|\.\d{1,9}"
MOST_PARTS = 10**8
"""Weights are whole parts of so many at most: the order of a mixture counts in 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data directory."""

    path: Path
    weight: int = 1
    """How many parts of the mixture it gives; those of all its sources have no common divisor."""


def sources_of(data_dir: DataDir) -> tuple[Source, ...]:
    """The sources in the order in which they are named. Only the weights' ratios count: 7 and 3 are 0.7 and 0.3.

    The weight is what follows the last colon of a word; a single path is taken as it stands.

    Raises:
        UserError: where one of several has no weight that is a positive number, where the weights need too fine parts,
            or a directory is named twice.
    """
    if isinstance(data_dir, Path):
        return (Source(path=data_dir),)
    if not data_dir:
        raise UserError("--data-dir: name a folder of token shards")
    weights: dict[Path, Fraction] = {}
    for word in data_dir:
        path, _, weight = word.rpartition(":")
        if not path or not re.fullmatch(WEIGHT, weight) or Fraction(weight) == 0:
            raise UserError(
                f"--data-dir {word}: each of several folders needs its weight, a positive number, after a colon, as in "
                "data/books:0.7 data/web:0.3"
            )
        if Path(path).resolve() in {other.resolve() for other in weights}:
            raise UserError(f"--data-dir names {path} twice: give it once, with the sum of its weights")
        weights[Path(path)] = Fraction(weight)
    unit = Fraction(
        math.gcd(*(weight.numerator for weight in weights.values())),
        math.lcm(*(weight.denominator for weight in weights.values())),
    )
    parts = {path: int(weight / unit) for path, weight in weights.items()}
    if sum(parts.values()) > MOST_PARTS:
        raise UserError(f"the weights of --data-dir {shown(data_dir)} have too many digits: round them to six")
    return tuple(Source(path=path, weight=weight) for path, weight in parts.items())


def source_faults(data_dir: DataDir) -> list[str]:
    """What `sources_of` raises, as a list of one; nothing where it raises nothing."""
    try:
        sources_of(data_dir)
    except UserError as error:
        return [str(error)]
    return []


def shown(data_dir: DataDir) -> str:
    """As a user writes it."""
    return str(data_dir) if isinstance(data_dir, Path) else " ".join(data_dir)


def said_of_mixture(data_dir: DataDir) -> list[str]:
    """A line that tells the share of each source; none where there is one."""
    sources = sources_of(data_dir)
    whole = sum(source.weight for source in sources)
    shares = ", ".join(f"{100 * source.weight / whole:.6g}% {source.path}" for source in sources)
    return [f"the data is a mixture: {shares}"] if len(sources) > 1 else []


def read_manifests(data_dir: DataDir) -> dict[Path, Manifest | None]:
    """The manifest of each source, None where there is none.

    Raises:
        UserError: where one is no manifest, or they are of several tokenizers; shards without a manifest are GPT-2's.
    """
    found = {source.path: read_manifest(source.path) for source in sources_of(data_dir)}
    (first, tokenizer), *others = ((path, told.tokenizer if told else "gpt2") for path, told in found.items())
    for path, other in others:
        if other != tokenizer:
            raise UserError(
                f"{first} is tokenized by {tokenizer[:60]!r} and {path} by {other[:60]!r}: a mixture needs one "
                "tokenizer; prepare one of them again"
            )
    return found


def data_source(data_dir: DataDir) -> str | list[str | None] | None:
    """What the manifest calls the source of the data, None where there is none; of a mixture a list of these."""
    found = [manifest.source if manifest else None for manifest in read_manifests(data_dir).values()]
    return found[0] if isinstance(data_dir, Path) else found
