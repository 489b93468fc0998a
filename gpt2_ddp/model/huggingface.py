"""GPT-2 weights from and to the layout of Hugging Face transformers, and where a model named by the user lies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.shapes import parameter_shapes
from gpt2_ddp.model.vocabulary import EOT
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json

PUBLISHED = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}
"""Hugging Face repositories of the weights that OpenAI released in 2019, and of the one distilled from the smallest."""

LAYER_NORM_EPSILON = 1e-5
MAX_SIZES = {"n_positions": 1 << 20, "vocab_size": 1 << 22, "n_layer": 1 << 10, "n_head": 1 << 10, "n_embd": 1 << 16}

IGNORED = re.compile(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias")
"""What the published files also store: the head, which is tied to `wte`, and the causal masks."""

CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
"""The matrices that transformers keeps as (in, out), where `torch.nn.Linear` has (out, in)."""


def hf_config(config: GPTConfig, eot: int = EOT) -> dict[str, object]:
    """The `config.json` of a `GPT2LMHeadModel` of this shape, padding and all; `eot` begins its documents."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": config.dropout,
        "bos_token_id": eot,
        "embd_pdrop": config.dropout,
        "eos_token_id": eot,
        "initializer_range": 0.02,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "model_type": "gpt2",
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": None,
        "n_layer": config.n_layer,
        "n_positions": config.block_size,
        "resid_pdrop": config.dropout,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }


def config_from_hf(config: Mapping[str, object]) -> GPTConfig:
    """The shape that a `config.json` describes; dropout is a choice of the next training run and left at 0.

    Raises:
        UserError: where it is not a GPT-2, lacks a size, or asks for arithmetic that `GPT` does not do.
    """
    if config.get("model_type") != "gpt2":
        raise UserError(f"model_type {config.get('model_type')!r} is not 'gpt2'")
    # transformers' defaults where a key is absent
    exact: dict[str, tuple[object, ...]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for key, allowed in exact.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} {config[key]!r} is not supported, only {allowed[0]!r}")
    sizes = {}
    for key, largest in MAX_SIZES.items():
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise UserError(f"{key} is {value!r}, and must be a whole number from 1 to {largest}")
        sizes[key] = value
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"n_inner {config['n_inner']!r} is not supported, only 4 n_embd = {4 * sizes['n_embd']}")
    return GPTConfig(block_size=sizes.pop("n_positions"), **sizes)


def to_hf(named_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our parameter names -> the same memory by those of `GPT2LMHeadModel`, matrices as transposed views.

    Works for anything shaped like the parameters. The tied head is not stored a second time. Nothing is copied: who
    writes the tensors lays them out, one after the other.
    """
    return {
        f"transformer.{name}": tensor.t() if CONV1D.fullmatch(name) else tensor
        for name, tensor in named_tensors.items()
    }


def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf`, exact to the bit; the head and the mask buffers of published files are left out."""
    ours = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {
        name: (tensor.t() if CONV1D.fullmatch(name) and tensor.ndim == 2 else tensor).contiguous()
        for name, tensor in ours.items()
        if not IGNORED.fullmatch(name)
    }


def load_model(directory: Path, *, vocab_size: int | None = None, dropout: float = 0.0) -> GPT:
    """The GPT-2 in a Hugging Face directory, which each of our checkpoints is; float32, on the CPU.

    `vocab_size` pads the token embedding with rows of its mean; None keeps the directory's own.

    Raises:
        UserError: where the directory has no GPT-2 in safetensors, or a tensor is missing, unknown or misshapen.
    """
    stored, files = _loadable(directory, vocab_size)
    model = GPT(replace(stored, vocab_size=vocab_size or stored.vocab_size, dropout=dropout))
    _copy_weights(files, model)
    with torch.no_grad():
        # Not zeros: GPT-2's logits lie between about -30 and -100, so that a row whose logit is 0 would take all the
        # probability. The mean row's logit is the mean logit. float64, so that the number of threads cannot show.
        wte = model.wte.weight
        wte[stored.vocab_size :] = wte[: stored.vocab_size].mean(0, dtype=torch.float64).float()
    return model


def loadable_config(directory: Path, *, vocab_size: int | None = None, dropout: float = 0.0) -> GPTConfig:
    """The shape of what `load_model` would load, the files checked by their headers alone.

    Raises:
        UserError: as `load_model`.
    """
    stored, _ = _loadable(directory, vocab_size)
    return replace(stored, vocab_size=vocab_size or stored.vocab_size, dropout=dropout)


def _loadable(directory: Path, vocab_size: int | None) -> tuple[GPTConfig, set[Path]]:
    """The shape that is stored, and the files with its weights."""
    stored = _stored_config(directory)
    if vocab_size is not None and vocab_size < stored.vocab_size:
        raise UserError(f"{directory} has {stored.vocab_size} token embeddings, more than {vocab_size}")
    return stored, _checked_files(directory, stored)


def load_weights(directory: Path, model: GPT) -> None:
    """Put the weights in a Hugging Face directory into those of `model`, on their device, one after the other.

    Raises:
        UserError: where the directory has no GPT-2 of this shape in safetensors; nothing is changed then.
    """
    stored = replace(_stored_config(directory), dropout=model.config.dropout)
    if stored != model.config:
        raise UserError(f"{directory} has {stored}, and the model is {model.config}")
    _copy_weights(_checked_files(directory, stored), model)


def _stored_config(directory: Path) -> GPTConfig:
    stored = read_json(directory / "config.json")
    try:
        return config_from_hf(stored)
    except ValueError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None


def _checked_files(directory: Path, stored: GPTConfig) -> set[Path]:
    """The safetensors files in which every weight of a GPT-2 of this shape is, and nothing else."""
    files = {name: path for path in _weight_files(directory) for name in _checked_names(path, stored)}
    missing = [name for name in parameter_shapes(stored) if name not in files]
    if missing:
        raise UserError(f"{directory} lacks {len(missing)} tensors, {missing[0]!r} among them")
    return set(files.values())


@torch.no_grad()
def _copy_weights(files: set[Path], model: GPT) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in _tensors(files):
        parameters[name][: len(tensor)].copy_(tensor)


def _checked_names(path: Path, config: GPTConfig) -> list[str]:
    """Our names of the tensors in a file, each known and shaped as `config` says, judged by its header alone."""
    expected = parameter_shapes(config)
    names = []
    with _open(path) as file:
        for stored in file.keys():  # noqa: SIM118  not a mapping
            name = stored.removeprefix("transformer.")
            if IGNORED.fullmatch(name):
                continue
            view = file.get_slice(stored)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if name not in expected:
                raise UserError(f"{path}: tensor {stored!r} is no part of a GPT-2 with {config.n_layer} layers")
            wanted = expected[name][::-1] if CONV1D.fullmatch(name) else expected[name]
            if shape != wanted:
                raise UserError(f"{path}: tensor {stored!r} has shape {shape}, and config.json asks for {wanted}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{path}: tensor {stored!r} holds {dtype}, not floating-point numbers")
            names.append(name)
    return names


def _tensors(paths: set[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in `paths` by our name, one at a time: a second copy of the model need not fit."""
    for path in paths:
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118  not a mapping
                yield from from_hf({stored: file.get_tensor(stored)}).items()


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: `model.safetensors`, or what its index lists."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        names = set(map(str, weight_map.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (directory / name).is_file():
                raise UserError(f"{index} lists {name!r}, which is no safetensors file in this directory")
        return [directory / name for name in sorted(names)]
    if (directory / "pytorch_model.bin").is_file():
        raise UserError(
            f"{directory} has its weights only as pytorch_model.bin, a pickle, which can run code when it is read: "
            "convert it with transformers' save_pretrained"
        )
    raise UserError(f"{directory} has no model.safetensors")


def find_model(name: str) -> Path:
    """The directory that `name` stands for: of a run, a checkpoint, a Hugging Face model, or a published GPT-2.

    A run stands for its newest complete checkpoint. A published size is downloaded once, through `huggingface_hub`.

    Raises:
        UserError: where there is no such model, a run has no checkpoint, or a download fails.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        complete = sorted((path / "checkpoints").glob("step_[0-9]*/manifest.json"))
        whole = [file.parent for file in complete if re.fullmatch(r"step_\d+", file.parent.name)]
        if not whole:
            raise UserError(f"{path} has no complete checkpoint yet")
        return max(whole, key=lambda folder: int(folder.name.removeprefix("step_")))
    if (path / "config.json").is_file():
        return path
    if name in PUBLISHED:
        return _download(name)
    if path.is_file():
        raise UserError(f"{path} is a file: make a model folder of it by python -m eval convert {path} FOLDER")
    if path.exists():
        raise UserError(f"{path} is neither a run nor a model: it has no checkpoints folder and no config.json")
    raise UserError(f"no model {name!r}: give a run, a checkpoint, a model folder, or one of {', '.join(PUBLISHED)}")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed by this branch alone

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(PUBLISHED[name], allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # each version of the library and of its HTTP client has its own classes
        raise UserError(
            f"cannot download {PUBLISHED[name]} ({type(error).__name__}; is there a network?): give a folder instead "
            "that has config.json and model.safetensors"
        ) from None
