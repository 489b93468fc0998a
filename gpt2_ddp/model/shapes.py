"""The shapes of a model's parameters, asked of the model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from gpt2_ddp.model.gpt import GPT, GPTConfig


@lru_cache(maxsize=16)
def parameter_shapes(config: GPTConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of a `GPT` by its name, without memory for any."""
    parameters = GPT(config, device="meta").named_parameters()
    return MappingProxyType({name: tuple(parameter.shape) for name, parameter in parameters})


def parameter_count(config: GPTConfig) -> int:
    """Parameters, the tied head counted once (124,475,904 for `gpt2` with its padding)."""
    return sum(map(math.prod, parameter_shapes(config).values()))


def block_matrix_size(config: GPTConfig) -> int:
    """Elements of the matrices of one block."""
    shapes = parameter_shapes(config).items()
    return sum(math.prod(shape) for name, shape in shapes if name.startswith("h.0.") and len(shape) > 1)
