"""`python -m eval convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from eval.llm_c import read_llm_c, write_llm_c
from eval.model_choice import TRAINED_LENGTH, trained_length
from eval.torch_files import read_torch_file
from gpt2_ddp.checkpoint.choice import require_whole_weights
from gpt2_ddp.checkpoint.files import Content, write_checkpoint
from gpt2_ddp.data.own_tokenizer import named_eot
from gpt2_ddp.data.tokenizer import tokenizer_files
from gpt2_ddp.metrics.log import warn
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import find_model, hf_config, load_model, to_hf
from gpt2_ddp.model.vocabulary import EOT, PADDED_VOCAB_SIZE, VOCAB_SIZE
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import MAX_JSON_BYTES, read_json, require_writable

LLM_C = {"llm.c": torch.float32, "llm.c-bf16": torch.bfloat16}
ZIP = b"PK\x03\x04"
LLM_C_MAGICS = range(20240000, 20250000)
"""llm.c numbers its formats by the day; all but the models' are refused by their number."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Weights from and to other programs. A file's content tells what it is; nothing in it is run."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, a checkpoint, a Hugging Face directory or a published name, as --model takes them elsewhere; a checkpoint
    of nanoGPT or build-nanogpt (.pt); a model of llm.c (.bin)."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The directory or, for llm.c, the file to make. What is already there is never written over."""
    to: Literal["hf", "hf-50257", "llm.c", "llm.c-bf16"] = "hf"
    """hf is a Hugging Face directory: for transformers, the lm-evaluation-harness, --model and --init-from. hf-50257
    is one without the padding of the vocabulary, for tools that insist. llm.c is a model file for it in float32,
    llm.c-bf16 in bfloat16, which its CUDA trainer asks for unless it is built otherwise."""

    def run(self) -> None:
        """Convert, and say what came out."""
        target = self.target.absolute()
        require_free(target)
        model, tokenizer, notes = read_source(self.source)
        folder = None if Path(self.source).is_file() else find_model(self.source)
        trained = trained_length(folder, model.config.block_size) if folder else None
        if trained and trained < model.config.block_size:
            notes.append(f"trained with {trained} tokens at once: the model knows nothing of later positions")
        stored = model.config.vocab_size
        rows = stored if self.to == "hf" else min(stored, max(unpadded(stored), ids_in(folder) if folder else 0))
        if self.to == "hf-50257" and rows != VOCAB_SIZE:
            ids = "" if rows == stored else f", {rows} of them for its tokenizer's ids"
            raise UserError(
                f"{self.source} has {stored} token embeddings{ids}: {VOCAB_SIZE} are GPT-2's, up to "
                f"{PADDED_VOCAB_SIZE} with their padding"
            )
        if self.to in LLM_C:
            write_llm_c(target, model, rows, LLM_C[self.to])
        else:
            if not tokenizer:
                notes.append(f"{stored} token embeddings are not of GPT-2's vocabulary: the tokenizer is not in there")
            eot = named_eot(folder) if folder else EOT if tokenizer else None
            write_checkpoint(target, hf_files(model, rows, tokenizer, eot, trained))
        for note in notes:
            warn(note)
        shape = model.config
        print(
            f"wrote {self.target}: GPT-2 of {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, "
            f"{shape.block_size} positions, {rows} token embeddings{'' if rows == stored else f' of {stored}'}"
        )


def require_free(target: Path) -> None:
    """
    Raises:
        UserError: where something is there already, other than an empty directory.
        OSError: where nothing can be made there.
    """
    for path in (target, target.with_name(f"{target.name}.tmp")):  # where it is made, before it is renamed
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise UserError(f"{path} is there already: name another target, or remove it")
    require_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)


def read_source(source: str) -> tuple[GPT, Mapping[str, bytes], list[str]]:
    """The model that `source` names, float32; the files of its tokenizer, none where it is not known; what to say.

    Raises:
        UserError: where there is no such model, or its file is not whole.
    """
    path = Path(source)
    notes: list[str] = []
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4)
        if start == ZIP:
            model, notes = read_torch_file(path)
        elif int.from_bytes(start, "little") in LLM_C_MAGICS:
            model = read_llm_c(path)
        else:
            raise UserError(
                f"{path} begins with {start!r}: it is no checkpoint of nanoGPT or build-nanogpt (a zip, since PyTorch "
                "1.6) and no model of llm.c; of a model of Hugging Face, name the directory"
            )
        return model, gpt2_files(model), notes
    path = find_model(source)
    require_whole_weights(path)
    model = load_model(path)
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if too_large := [file for file in files if file.stat().st_size > MAX_JSON_BYTES]:
        raise UserError(f"{too_large[0]} has {too_large[0].stat().st_size} bytes, more than {MAX_JSON_BYTES}")
    return model, {file.name: file.read_bytes() for file in files} or gpt2_files(model), notes


def gpt2_files(model: GPT) -> dict[str, bytes]:
    """The files of GPT-2's tokenizer, where that is the model's."""
    if unpadded(model.config.vocab_size) != VOCAB_SIZE:
        return {}
    return tokenizer_files(model.config.block_size)


def unpadded(rows: int) -> int:
    """Token embeddings without the padding of GPT-2's vocabulary; all of them, where they are of another one."""
    return VOCAB_SIZE if VOCAB_SIZE <= rows <= PADDED_VOCAB_SIZE else rows


def ids_in(folder: Path) -> int:
    """How many ids the tokenizer in a model's directory has, by its files; 0 where there are none."""
    ids = [-1]
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        found = read_json(folder / name) if (folder / name).is_file() else {}
        model, added = found.get("model"), found.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else found
        told = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        told += [len(vocabulary) - 1] if isinstance(vocabulary, list) else []  # as Unigram has it, in the ids' order
        told += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids += [number for number in told if isinstance(number, int)]
    return max(ids) + 1


def hf_files(
    model: GPT, rows: int, tokenizer: Mapping[str, bytes], eot: int | None = EOT, trained: int | None = None
) -> dict[str, Content]:
    """The files of a Hugging Face directory with the first `rows` token embeddings; `eot` begins documents, and
    `trained` positions were ever learned.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    config: dict[str, Any] = hf_config(replace(model.config, vocab_size=rows), eot or 0)
    if eot is None or rows <= eot:
        config |= {"bos_token_id": None, "eos_token_id": None}
    if trained:
        config[TRAINED_LENGTH] = trained
    tensors["wte.weight"] = tensors["wte.weight"][:rows]
    return {"config.json": config, **tokenizer, "model.safetensors": to_hf(tensors)}
