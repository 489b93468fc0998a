"""The model files of llm.c: a header of 256 int32, then all parameters, those of a kind together for all layers.

The layout is that of `write_model` and `write_tensors` in llm.c's train_gpt2.py (github.com/karpathy/llm.c), which its
trainers in C and CUDA read and write too: matrices as (out, in), `wte` padded to a multiple of 128 with rows that its
softmax leaves out. All numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import config_from_hf
from gpt2_ddp.model.shapes import parameter_shapes
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import flush, flush_directory, rename

MAGIC = 20240326
DTYPES = {3: torch.float32, 5: torch.bfloat16}
"""Of the parameters, by the version in the header; older versions had no padding."""
HEADER = struct.Struct("<256i")
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
"""What follows magic and version in the header; the padded vocabulary is next, the rest is zero."""
PADDED_TO = 128
LAYER = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def read_llm_c(path: Path) -> GPT:
    """The model in a file of llm.c, float32, without the padding of its vocabulary.

    Raises:
        UserError: where the file has not exactly the parameters of the GPT-2 that its header describes.
    """
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
        if len(start) < HEADER.size:
            raise UserError(f"{path} has {len(start)} bytes, and a model of llm.c begins with {HEADER.size}")
        magic, version, *sizes = HEADER.unpack(start)
        if magic != MAGIC or version not in DTYPES:
            raise UserError(
                f"{path} has magic {magic} and version {version}: a model of llm.c has {MAGIC}, and 3 (float32) or "
                "5 (bfloat16)"
            )
        config, padded, dtype = _config(path, sizes), sizes[len(SIZES)], DTYPES[version]
        wanted = HEADER.size + dtype.itemsize * numbers(config, padded)
        if (size := path.stat().st_size) != wanted:
            raise UserError(f"{path} has {size} bytes, and its header asks for {wanted}: it is cut off, or no GPT-2")
        model = GPT(config)
        parameters = dict(model.named_parameters())
        for name, shape in layout(config, padded).items():
            stored = bytearray(dtype.itemsize * math.prod(shape))
            if file.readinto(stored) != len(stored):
                raise UserError(f"{path} ended while it was read")
            _put(parameters[name], torch.frombuffer(stored, dtype=dtype).view(shape))
    return model


def _config(path: Path, sizes: list[int]) -> GPTConfig:
    try:
        config = config_from_hf({"model_type": "gpt2", **dict(zip(SIZES, sizes, strict=False))})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    padded = sizes[len(SIZES)]
    if not config.vocab_size <= padded < config.vocab_size + 2 * PADDED_TO:
        raise UserError(f"{path}: a vocabulary of {config.vocab_size} cannot be padded to {padded}")
    return config


@torch.no_grad()
def _put(parameter: Tensor, stored: Tensor) -> None:
    parameter.copy_(stored[: len(parameter)])


def layout(config: GPTConfig, padded: int) -> dict[str, tuple[int, ...]]:
    """The parameters by our names, in the order and with the shapes of the file; `wte` has `padded` rows."""
    layers = [f"h.{layer}.{part}" for part in LAYER for layer in range(config.n_layer)]
    shapes = parameter_shapes(config)
    ordered = {name: shapes[name] for name in ("wte.weight", "wpe.weight", *layers, "ln_f.weight", "ln_f.bias")}
    return ordered | {"wte.weight": (padded, config.n_embd)}


def numbers(config: GPTConfig, padded: int) -> int:
    """How many the file holds, by the shapes of one layer: a header may lie about a thousand."""
    shapes = layout(replace(config, n_layer=1), padded).items()
    layer = sum(math.prod(shape) for name, shape in shapes if name.startswith("h."))
    return sum(math.prod(shape) for _, shape in shapes) + (config.n_layer - 1) * layer


def write_llm_c(path: Path, model: GPT, vocab_size: int, dtype: torch.dtype) -> None:
    """Write `model` with the first `vocab_size` of its token embeddings; the file appears when it is whole.

    Rounding to bfloat16 is to the nearest, as llm.c's own.

    Raises:
        OSError: where the disk refuses it.
    """
    config, parameters = model.config, dict(model.named_parameters())
    padded = -(-vocab_size // PADDED_TO) * PADDED_TO
    version = next(version for version, kind in DTYPES.items() if kind == dtype)
    sizes = (config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd, padded)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(HEADER.pack(MAGIC, version, *sizes, *[0] * (256 - 2 - len(sizes))))
            for name in layout(config, padded):
                tensor = parameters[name].detach()
                if name == "wte.weight":
                    tensor = torch.cat([tensor[:vocab_size], tensor.new_zeros(padded - vocab_size, config.n_embd)])
                file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)
            flush(file)
        rename(aside, path)
        flush_directory(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
