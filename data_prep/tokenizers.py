"""Tokenizers of the user's own: where one comes from, and how one is made of a text."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gpt2_ddp.data.own_tokenizer import ENDS, FILE, SETTINGS, OwnTokenizer, own_tokenizer
from gpt2_ddp.model.vocabulary import MOST_TOKENS
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file, require_writable

from .files import Files
from .sources import Source

FEWEST_TOKENS = 256 + 1
"""A byte each, and the end of a text."""
INSTALL = 'this needs the tokenizers library: pip install -e ".[tokenizers]" in the checkout'


def found_tokenizer(name: str) -> OwnTokenizer:
    """The tokenizer that --tokenizer names: a file, a folder, or a model on the hub.

    Raises:
        UserError: where there is none.
    """
    place = Path(name)
    return own_tokenizer(place if place.exists() else _downloaded(name))


def _downloaded(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["tokenizer*.json"], etag_timeout=5))
    except Exception as error:  # each version of the library and of its HTTP client has its own classes
        raise UserError(
            f"--tokenizer {name}: no such file or folder, and nothing on the hub ({type(error).__name__}): give a "
            f"{FILE}, or make one by: python -m data_prep train-tokenizer"
        ) from None


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """A byte-level BPE tokenizer made of your own text, for --tokenizer of the other commands."""

    paths: Positional[tuple[str, ...]]
    """Files, folders and glob patterns, as `text` takes them."""
    out: Path
    """Directory for tokenizer.json."""
    vocab_size: int = 32768
    """Tokens, the 256 bytes and <|endoftext|> among them; fewer where the text has too little that repeats."""
    text_field: str = "text"
    """Field of .jsonl and column of .parquet that holds the text."""

    def run(self) -> None:
        """Write the tokenizer and say what to do with it."""
        if not FEWEST_TOKENS <= self.vocab_size <= MOST_TOKENS:
            raise UserError(f"--vocab-size {self.vocab_size} should be from {FEWEST_TOKENS} to {MOST_TOKENS}")
        if not self.paths:
            raise UserError("no file given; python -m data_prep train-tokenizer FILE_OR_FOLDER... --out DIR")
        for path in (self.out / FILE, self.out / SETTINGS):
            if path.exists():
                raise UserError(f"{path} is there already; choose another --out, or delete it")
        require_writable(self.out)
        source = Files(paths=self.paths, text_field=self.text_field)
        source.check()
        tokenizer = OwnTokenizer(trained(source, self.vocab_size), 0)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, contents in tokenizer.files().items():
            replace_file(self.out / name, contents)
        print(f"{tokenizer.n_vocab:,} tokens in {self.out / FILE}")
        paths = shlex.join(self.paths) if len(self.paths) < 4 else "FILES_OR_FOLDERS"
        print(f"next: python -m data_prep text {paths} --tokenizer {shlex.quote(str(self.out))} --out DIR")


def trained(source: Source, vocab_size: int) -> bytes:
    """A tokenizer.json made of the documents of `source`; `<|endoftext|>` has the id 0.

    Bytes are merged within the words of GPT-2's pattern (Radford et al. 2019, section 2.2).

    Raises:
        UserError: where there is no text, or the library is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(INSTALL) from None
    texts = _texts(source)
    if (first := next(texts, None)) is None:
        raise UserError(f"no document with text in {source.name}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDS[0]],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    return str(tokenizer.to_str(pretty=True)).encode()


def _texts(source: Source) -> Iterator[str]:
    for chunk in source.chunks(0):
        for text in source.documents(chunk):
            if text:
                yield text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text to the library
