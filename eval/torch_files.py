"""The checkpoints of nanoGPT and build-nanogpt: what `torch.save` wrote, read without running anything of theirs.

Such a file is a zip with a pickle, and a pickle names functions that are called when it is read. `weights_only` lets a
few dozen be called, some of which take as much memory as they are told; here it is only what places tensors. The class
of build-nanogpt's config, which torch refuses, is replaced by an empty one of ours: its fields come as they are stored.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import IGNORED, config_from_hf
from gpt2_ddp.model.shapes import parameter_shapes
from gpt2_ddp.system.errors import UserError

HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|b?float\d+)"
)
CONFIG_CLASS = re.compile(r"[\w.]+ GPTConfig")
MOST_PICKLE = 16 << 20
"""Bytes of the pickle, which has no tensor's numbers in it: for 1558M and its optimizer's state, under a megabyte."""
PREFIX = re.compile(r"(_orig_mod\.|module\.)*(transformer\.)?")
"""What torch.compile, DDP and nanoGPT put before a parameter's name."""
FIELDS = {"n_positions": "block_size", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
GELU_NOTE = (
    "nanoGPT's present code computes GELU exactly, GPT-2 (and this project) by the tanh approximation: logits differ a "
    'little. For those of nanoGPT in transformers, set "activation_function": "gelu" in config.json'
)


class StoredConfig:
    """Stands for build-nanogpt's `GPTConfig`, a place for its fields."""


def read_torch_file(path: Path) -> tuple[GPT, list[str]]:
    """The model in a checkpoint of nanoGPT or build-nanogpt, float32, and what is to be said of it.

    Biases that nanoGPT was told to do without are zeros, which compute the same.

    Raises:
        UserError: where the file is damaged, asks for more than to place tensors, or holds no GPT-2.
    """
    checkpoint = _load(path)
    notes = []
    fields = checkpoint.get("model_args")
    if fields is not None:
        notes.append(GELU_NOTE)
    else:
        fields = checkpoint.get("config")
    fields = vars(fields) if isinstance(fields, StoredConfig) else fields
    stored = checkpoint.get("model")
    if not isinstance(fields, Mapping) or not isinstance(stored, Mapping):
        raise UserError(
            f"{path} is neither nanoGPT's (with 'model' and 'model_args') nor build-nanogpt's (with 'model' and "
            "'config')"
        )
    try:
        config = config_from_hf({"model_type": "gpt2"} | {name: fields.get(field) for name, field in FIELDS.items()})
        tensors = _parameters(stored, config, path.stat().st_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name]) if name in tensors else parameter.zero_()
    if len(tensors) < len(parameter_shapes(config)):
        notes.append("it has no biases: zeros stand for them, and training goes on with biases")
    return model, notes


def _load(path: Path) -> dict[str, Any]:
    try:
        strange = _named_in(path)
        classes = {name for name in strange if CONFIG_CLASS.fullmatch(name)}
        if foreign := sorted(strange - classes):
            raise UserError(
                f"{path} cannot be read safely: its pickle asks for {', '.join(foreign)[:80]!r}, which may run code. "
                "If you trust it, load it in the program that wrote it, and save its weights anew: "
                "torch.save({'model': model.state_dict(), 'config': dict(block_size=..., vocab_size=..., n_layer=..., "
                "n_head=..., n_embd=...)}, 'plain.pt')"
            )
        allowed = [(StoredConfig, name.replace(" ", ".")) for name in classes]
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UserError, OSError):
        raise
    except Exception as error:  # damage shows itself as whatever the bytes happen to be taken for
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} is no whole file of torch.save ({type(error).__name__}: {reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint with a 'model'")
    return checkpoint


def _named_in(path: Path) -> set[str]:
    """What the pickle in a file of torch.save names beside what places tensors, as "module name".

    Raises:
        UserError: where its parts claim more bytes than it has, or the pickle is none of torch.save's.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} holds parts that are larger than itself")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE:
            raise UserError(f"{path} is a zip, but not one of torch.save")
        named = set()
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise UserError(f"{path} holds a pickle that torch.save does not write ({operation.name})")
            if operation.name == "GLOBAL":
                named.add(str(argument))
    return {name for name in named if not HARMLESS.fullmatch(name)}


def _parameters(stored: Mapping[Any, Any], config: GPTConfig, most: int) -> dict[str, Tensor]:
    """The tensors by our names, each known and of its shape, together in no more than `most` bytes."""
    if len(stored) < config.n_layer:
        raise UserError(f"it has {len(stored)} tensors, too few for {config.n_layer} layers")
    ours = {PREFIX.sub("", str(name), count=1): tensor for name, tensor in stored.items()}
    expected = parameter_shapes(config)
    head = ours.get("lm_head.weight")
    tensors = {name: tensor for name, tensor in ours.items() if not IGNORED.fullmatch(name)}
    for name, tensor in (tensors if head is None else tensors | {"lm_head.weight": head}).items():
        wanted = expected.get("wte.weight" if name == "lm_head.weight" else name)
        if wanted is None:
            raise UserError(f"{name[:60]!r} is no part of a GPT-2 with {config.n_layer} layers")
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(f"{name!r} is no tensor of floating-point numbers")
        if tensor.shape != wanted:
            raise UserError(f"{name!r} has shape {tuple(tensor.shape)}, and its config asks for {wanted}")
    if sum(tensor.nbytes for tensor in tensors.values()) > most:
        raise UserError(f"its tensors claim more than the {most} bytes that it has")
    biases = {name for name in expected if name.endswith(".bias")}
    missing = [name for name in expected if name not in tensors and (name not in biases or biases & tensors.keys())]
    if missing:
        raise UserError(f"it lacks {len(missing)} tensors, {missing[0]!r} among them")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError("its lm_head is not its wte, to which a GPT-2's head is tied")
    return tensors
