"""Model files of other programs, written and computed by code of their own: NumPy, struct and plain tensors."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model that is small in all but its vocabulary."""

    positions: int = 12
    vocab: int = 50257
    layers: int = 2
    heads: int = 2
    channels: int = 8

    def fields(self) -> dict[str, int]:
        """As nanoGPT and build-nanogpt call them."""
        return {
            "block_size": self.positions,
            "vocab_size": self.vocab,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_embd": self.channels,
        }


def weights(shape: Shape, *, biases: bool = True, seed: int = 0) -> Arrays:
    """Random ones by GPT-2's names, matrices as (out, in)."""
    draw, c = np.random.default_rng(seed), shape.channels
    parts = {"wte.weight": (shape.vocab, c), "wpe.weight": (shape.positions, c)}
    for layer in range(shape.layers):
        parts |= {f"h.{layer}.ln_1.weight": (c,), f"h.{layer}.attn.c_attn.weight": (3 * c, c)}
        parts |= {f"h.{layer}.attn.c_proj.weight": (c, c), f"h.{layer}.ln_2.weight": (c,)}
        parts |= {f"h.{layer}.mlp.c_fc.weight": (4 * c, c), f"h.{layer}.mlp.c_proj.weight": (c, 4 * c)}
    parts["ln_f.weight"] = (c,)
    for name, size in list(parts.items()):
        if biases and name not in ("wte.weight", "wpe.weight"):
            parts[name.replace(".weight", ".bias")] = size[:1]
    return {name: draw.normal(0.1, 0.3, size).astype(np.float32) for name, size in parts.items()}


def exact_gelu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def logits(
    given: Mapping[str, npt.NDArray[np.float32]],
    ids: list[int],
    heads: int,
    gelu: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]] = tanh_gelu,
) -> npt.NDArray[np.float64]:
    """GPT-2 in float64: (positions, vocabulary); a bias that is not there is none."""
    w = {name: array.astype(np.float64) for name, array in given.items()}

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(sum(name.endswith("ln_1.weight") for name in w)):
        at = f"h.{layer}"
        mixed = []
        q, k, v = np.split(linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn"), 3, axis=-1)
        for part in np.split(np.arange(x.shape[1]), heads):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part)) + future
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(mixed, axis=-1), f"{at}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")), f"{at}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def state_dict(arrays: Arrays, prefix: str = "transformer.") -> dict[str, Tensor]:
    """As nanoGPT's and build-nanogpt's model gives it, the head being the embedding."""
    tensors = {f"{prefix}{name}": torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | {f"{prefix.removesuffix('transformer.')}lm_head.weight": tensors[f"{prefix}wte.weight"]}


def nanogpt(shape: Shape, model: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What nanoGPT's train.py saves, the state of AdamW after a step with it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "model_args": shape.fields() | {"bias": True, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
        **more,
    }


def save_build_nanogpt(path: Path, shape: Shape, model: dict[str, Tensor]) -> None:
    """What build-nanogpt's train_gpt2.py saves: its config is a class of the script, which is `__main__`."""
    script = sys.modules["__main__"]
    made = make_dataclass("GPTConfig", [(name, int, value) for name, value in shape.fields().items()])
    made.__module__ = "__main__"
    script.GPTConfig = made  # type: ignore[attr-defined]
    try:
        torch.save({"model": model, "config": made(), "step": 5000, "val_loss": 3.28}, path)
    finally:
        del script.GPTConfig  # type: ignore[attr-defined]


KINDS = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def llm_c(shape: Shape, arrays: Arrays, *, bfloat16: bool = False, **header: int) -> bytes:
    """A model file of llm.c; `header` puts other numbers into it: version, positions, vocab, layers, ..., padded."""
    padded = -(-shape.vocab // 128) * 128
    numbers = {"magic": 20240326, "version": 5 if bfloat16 else 3, **vars(shape)}
    numbers = {**numbers, "padded": padded, **header}
    rows = np.zeros((padded - shape.vocab, shape.channels), np.float32)
    ordered = [arrays["wte.weight"], rows, arrays["wpe.weight"]]
    ordered += [arrays[f"h.{layer}.{kind}"] for kind in KINDS for layer in range(shape.layers)]
    ordered += [arrays["ln_f.weight"], arrays["ln_f.bias"]]
    content = b"".join((nearest_bfloat16(part) if bfloat16 else part.astype("<f4")).tobytes() for part in ordered)
    return struct.pack("<8i", *numbers.values()) + bytes(1024 - 32) + content


def nearest_bfloat16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves, rounded to the nearest, and to the even one of two that are."""
    bits = array.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
