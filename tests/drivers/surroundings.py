"""What a training process finds around it, changed inside it: `SURROUNDINGS` maps names to functions, as `FAULTS`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drivers.faults import RANK, before_step


def compile_fails(*, rank: int, listing: str) -> None:
    """The compiler fails on one rank when the first graph comes. Elsewhere it changes nothing and is quick, and whether
    training runs what it gave is noted at `listing` and the rank.
    """
    compiled, training = torch.compile, [False]
    before_step(lambda *_: training.append(True))

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        if rank == RANK:
            raise RuntimeError("no compiler here")

        def called(*args: Any) -> Any:
            if training[-1]:
                Path(f"{listing}{RANK}").touch()
            return graph(*args)

        return called

    torch.compile = lambda *args, **options: compiled(*args, **{**options, "backend": backend})


def missing(*, module: str) -> None:
    """A package is not installed."""
    sys.modules[module] = None


SURROUNDINGS = {change.__name__: change for change in (compile_fails, missing)}
