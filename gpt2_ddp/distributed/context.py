"""One rank's view of the run: who it is, where it computes, and what it says to the others."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2_ddp.distributed.rendezvous import START_TIMEOUT, Place, find_place, meet
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.hardware import choose_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")


@dataclass
class Pulse:
    """Counts how often a rank has got on with its work, for whoever watches it."""

    beats: int = 0


@dataclass(frozen=True, kw_only=True)
class DistContext(Place):
    """One process of the run. With `world_size` 1 every collective is a no-op and no process group exists."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    pulse: Pulse = field(default_factory=Pulse)
    store: Store | None = None
    """Shared by the ranks of this start; None in a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced in place by its sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Travels between CPUs, so the GPU is not waited for."""
        return self.max(int(flag)) > 0

    def max(self, number: int) -> int:
        """The largest `number` of all ranks, by way of the CPUs."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def run_on_all(self, make: Callable[[], T]) -> T:
        """What `make` returns here; where it fails on any rank it fails on all, so that none is left waiting.

        Raises:
            UserError: the rank's own error (or `OSError`), or else the message of the first rank that has one.
        """
        value, error = None, None
        try:
            value = make()
        except (ValueError, OSError, torch.OutOfMemoryError) as caught:
            error = caught
        told = self.gather(str(error) if error else None)
        if error:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise UserError(f"rank {rank}: {message}")
        return cast(T, value)

    def run_on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; it runs there alone, and its error is everybody's."""
        return self.broadcast(self.run_on_all(lambda: make() if self.is_main else cast(T, None)))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put rank 0's numbers into the `tensors` of every rank, in place and one by one, so that no second set exists.

        NCCL carries those on a GPU. They must be contiguous.

        Raises:
            UserError: where a rank's tensors are not those of rank 0 by name, shape and dtype, before any is sent.
        """
        if self.world_size == 1:
            return
        mine = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()]
        theirs = self.broadcast(mine)
        self.run_on_all(lambda: require_same_tensors(mine, theirs))
        for tensor in tensors.values():
            self.broadcast_from(0, tensor.detach())

    def broadcast_from(self, source: int, tensor: Tensor) -> None:
        """Put the numbers of rank `source` into the contiguous `tensor` of every rank, alike in shape and dtype."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source)

    def add_from(self, partner: int, tensor: Tensor) -> None:
        """Add `partner`'s tensor of the same shape to `tensor` in place, while it does the same with this one."""
        theirs = torch.empty_like(tensor)
        exchange = [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        tensor.add_(theirs)

    def note_progress(self) -> None:
        """Note that this rank gets on with its work."""
        self.pulse.beats += 1

    def shorten_timeouts(self, seconds: float) -> None:
        """From now on a collective that takes longer than `seconds` fails."""
        if self.world_size > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def require_same_tensors(mine: Sequence[str], theirs: Sequence[str]) -> None:
    """
    Raises:
        UserError: naming the first tensor that is another one here than on rank 0.
    """
    for here, there in itertools.zip_longest(mine, theirs, fillvalue="nothing"):
        if here != there:
            raise UserError(f"this rank has {here} where rank 0 has {there}: give all ranks the same flags and version")


@contextmanager
def open_context(requested_device: str = "auto") -> Iterator[DistContext]:
    """The `DistContext` of this process: from torchrun's environment, or of a single process where there is none.

    NCCL carries what lies on a GPU, gloo what lies in main memory. The group is destroyed in the end, NCCL's not after
    an error, of which the other ranks may know nothing.

    Raises:
        UserError: where the environment is not that of a single process or of torchrun, or the device is not there.
    """
    place = find_place(os.environ)
    device = choose_device(requested_device, local_rank=place.local_rank, local_world_size=place.local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    context = DistContext(**asdict(place), device=device)
    if context.world_size == 1:
        yield context
        return
    shared, prefix = meet(place)
    store = dist.PrefixStore(prefix, shared)  # type: ignore[attr-defined]
    bound = device if device.type == "cuda" else None
    backend = "cpu:gloo,cuda:nccl" if bound else "gloo"
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=START_TIMEOUT, device_id=bound
    )
    try:
        yield replace(context, store=dist.PrefixStore(prefix, shared.clone()))  # type: ignore[attr-defined]
    finally:
        if bound is None or sys.exc_info()[0] is None:  # NCCL's is collective: a rank that fails alone would wait in it
            dist.destroy_process_group()
