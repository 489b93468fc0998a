"""A tokenizer of the user's own: a file of the `tokenizers` library, as Hugging Face models have it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from gpt2_ddp.model.vocabulary import EOT, MOST_TOKENS, PADDED_VOCAB_SIZE, VOCAB_SIZE
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json

FILE, SETTINGS, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.json"
GPT2_VOCABULARY = "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2"
"""SHA-256 of GPT-2's vocab.json with its tokens sorted: what it holds can be told without the tokenizer."""
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""Names under which tokenizers have what ends a text, where no file says which it is."""


class OwnTokenizer:
    """A `tokenizers` file with the interface of `data.tokenizer.Tokenizer`."""

    def __init__(self, contents: bytes, eot: int) -> None:
        from tokenizers import Tokenizer  # an extra

        self.contents, self.eot_token = contents, eot
        self._tokenizer = Tokenizer.from_buffer(contents)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # what looks like one in a text is text
        self.n_vocab: int = max(self._tokenizer.get_vocab().values()) + 1  # there may be gaps

    @property
    def name(self) -> str:
        """As a manifest calls it."""
        return digest_name(self.contents)

    @property
    def end(self) -> str:
        """The token that begins every document."""
        return str(self._tokenizer.id_to_token(self.eot_token))

    @property
    def special_tokens_set(self) -> set[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return {token.content for token in added if token.special} | {self.end}

    def encode_single_token(self, text_or_bytes: str, /) -> int:
        return int(self._tokenizer.get_vocab()[text_or_bytes])

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, by as many threads as RAYON_NUM_THREADS says.

        Raises:
            UserError: where a text has the token in it that begins documents.
        """
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is no text to it
        rows = [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if any(self.eot_token in row for row in rows):
            raise UserError(f"{self.end!r} of {FILE} occurs in a text: it must be marked as special there")
        return rows

    def decode(self, tokens: Sequence[int], /) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def decode_bytes(self, tokens: Sequence[int], /) -> bytes:
        if self._spells_bytes:
            return b"".join(map(self.decode_single_token_bytes, tokens))
        if len(tokens) != 1:
            return self.decode(tokens).encode()
        return self.decode([*tokens, *tokens]).removeprefix(self.decode(tokens)).encode()  # with the space before it

    def decode_single_token_bytes(self, token: int) -> bytes:
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return b""
        if not self._spells_bytes:
            raise UserError(f"{FILE} is not a byte-level tokenizer: the bytes of its tokens are not known")
        return bytes(map(self._bytes.__getitem__, spelled)) if self._bytes.keys() >= set(spelled) else spelled.encode()

    @cached_property
    def _spells_bytes(self) -> bool:
        return any(part.get("type") == "ByteLevel" for part in _parts(json.loads(self.contents).get("decoder")))

    @cached_property
    def _bytes(self) -> dict[str, int]:
        return {letter: byte for byte, letter in enumerate(printable_bytes())}

    def files(self) -> dict[str, bytes]:
        """The files from which `transformers.AutoTokenizer` builds the same tokenizer, by file name."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.end,
            "eos_token": self.end,
            "clean_up_tokenization_spaces": False,
        }
        return {FILE: self.contents, SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()}


def _parts(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder, or those that it is a sequence of."""
    yield from [decoder or {}, *(decoder or {}).get("decoders", [])]


@lru_cache(maxsize=4)
def own_tokenizer(place: Path, eot: int | None = None) -> OwnTokenizer:
    """The tokenizer in `place`, a `tokenizers` file or a directory with its tokenizer.json.

    `eot` begins documents; if not given, the token that a tokenizer_config.json beside it calls `eos_token`, or one of
    `ENDS`.

    Raises:
        UserError: where there is none, it has no such token or more ids than a shard can hold, or the library is not
            installed.
    """
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}: give a {FILE} of the tokenizers library, or the folder it lies in")
    try:
        found = OwnTokenizer(file.read_bytes(), eot or 0)
    except ImportError:
        raise UserError(
            f'{file} needs the tokenizers library: pip install -e ".[tokenizers]" in the checkout'
        ) from None
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{file} is no file of the tokenizers library ({' '.join(str(error).split())[:200]})") from None
    if found.n_vocab > MOST_TOKENS:
        raise UserError(f"{file} has {found.n_vocab} ids, and shards of uint16 can hold {MOST_TOKENS}")
    if eot is None:
        found.eot_token = _find_end(file, found)
    if not 0 <= found.eot_token < found.n_vocab:
        raise UserError(f"{file} has {found.n_vocab} ids, and {found.eot_token} is to begin documents")
    return found


def _find_end(file: Path, tokenizer: OwnTokenizer) -> int:
    settings = file.parent / SETTINGS
    named = read_json(settings).get("eos_token") if settings.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named  # older files have it whole
    vocabulary = tokenizer._tokenizer.get_vocab()
    for end in [named] if isinstance(named, str) else ENDS:
        if end in vocabulary:
            return int(vocabulary[end])
    mend = f"name its token between documents as eos_token in {settings}"
    raise UserError(f"{file} has none of {', '.join(ENDS)}: {mend}")


def has_own(directory: Path) -> bool:
    """Whether a model's directory has a tokenizer that is not GPT-2's: by its settings, its ids or the model's.

    Raises:
        UserError: where it has no tokenizer.json, and the model's tokens cannot be GPT-2's.
    """
    settings, config = directory / SETTINGS, directory / "config.json"
    if not (directory / FILE).is_file():
        _require_gpt2s(config, directory / VOCABULARY)
        return False
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    shape = read_json(config) if config.is_file() else {}
    rows, end = shape.get("vocab_size"), shape.get("eos_token_id")
    gpt2 = end in (None, EOT) and isinstance(rows, int) and VOCAB_SIZE <= rows <= PADDED_VOCAB_SIZE
    if not gpt2 or kind not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        return True
    model = read_json(directory / FILE).get("model")
    return not _is_gpt2s(model.get("vocab") if isinstance(model, dict) else None)


def _require_gpt2s(config: Path, vocabulary: Path) -> None:
    rows = read_json(config).get("vocab_size") if config.is_file() else None
    if vocabulary.is_file():
        if _is_gpt2s(read_json(vocabulary)):
            return
        found = f"a {VOCABULARY} that is not GPT-2's"
    elif isinstance(rows, int) and not VOCAB_SIZE <= rows <= PADDED_VOCAB_SIZE:
        found = f"{rows} token embeddings, GPT-2's tokenizer has {VOCAB_SIZE} ids"
    else:
        return
    raise UserError(
        f"{config.parent} has {found}, and no {FILE} of its own: save it there with transformers' AutoTokenizer"
    )


def _is_gpt2s(vocabulary: object) -> bool:
    """Whether the ids by their tokens, as a vocab.json has them, are GPT-2's."""
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest() == GPT2_VOCABULARY


def named_eot(directory: Path) -> int | None:
    """The id that a model's config.json says ends a text."""
    file = directory / "config.json"
    end = read_json(file).get("eos_token_id") if file.is_file() else None
    return end if isinstance(end, int) and not isinstance(end, bool) and end >= 0 else None


def name_in(directory: Path) -> str:
    """What a manifest would call the tokenizer of the model in a directory; nothing is loaded. Raises as `has_own`."""
    return digest_name((directory / FILE).read_bytes()) if has_own(directory) else "gpt2"


def digest_name(contents: bytes) -> str:
    """The name of the tokenizer in a file of these bytes."""
    return "sha256:" + hashlib.sha256(contents).hexdigest()


def printable_bytes() -> list[str]:
    """For each byte, the character that stands for it in GPT-2's files: itself where it can be printed."""
    shown = [chr(byte).isprintable() and chr(byte) != " " for byte in range(256)]
    return [chr(byte if shown[byte] else 256 + shown[:byte].count(False)) for byte in range(256)]
