"""Ranks that should be alike and are not: their data at the start, their weights later."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.system.errors import UserError


def require_same_data(context: DistContext, mine: str) -> None:
    """
    Raises:
        UserError: where a rank reads other training data than rank 0, naming it and its host.
    """
    told = context.gather((mine, socket.gethostname()))
    for rank, (found, host) in enumerate(told):
        if found != told[0][0]:
            raise UserError(
                f"the training data of rank {rank} on {host} differs from that of rank 0 on {told[0][1]}: "
                "copy the same --data-dir to every node"
            )


def require_equal_ranks(context: DistContext, tensors: Mapping[str, Tensor]) -> None:
    """Check that all ranks hold the same `tensors` of 32-bit numbers, by a sum of their bits that any one bit changes.

    Raises:
        RuntimeError: naming each rank and its first tensor that is not what most ranks have; all, if there is no most.
    """
    if context.world_size == 1:
        return
    sums = torch.stack([tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors.values()])
    told = context.gather(sums.tolist())
    drifted: dict[int, str] = {}
    for index, name in enumerate(tensors):
        [(usual, votes)] = Counter(values[index] for values in told).most_common(1)
        for rank, values in enumerate(told):
            if values[index] != usual or 2 * votes <= context.world_size:
                drifted.setdefault(rank, name)
    if drifted:
        named = ", ".join(f"rank {rank} in {name}" for rank, name in sorted(drifted.items()))
        raise RuntimeError(f"the ranks no longer hold the same weights; out of line: {named}")
