"""The global order of the training data, and the batches of one rank.

`step` is the only cursor: which tokens a step consumes is a pure function of (seed, step, batch size), so nothing
about a loader is saved, seeking costs nothing, and any number of ranks sees the same tokens in the same order.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2_ddp.data.shards import OpenShard, Shard, check_tokens
from gpt2_ddp.system.errors import OneRankError, UserError, user_error

Indices = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6
OPEN_SHARDS = 128
"""Shards that a reader keeps open: there can be more of them than files that a process may open."""
PREFETCH = 2
"""Steps that are read ahead of the one being computed."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a step's tokens are divided over ranks and micro-steps; the only place where accumulation is derived.

    Raises:
        UserError: where they do not divide, with the nearest batch sizes that do.
    """

    micro_batch_size: int
    sequence_length: int
    total_batch_size: int
    world_size: int = 1

    def __post_init__(self) -> None:
        unit = self.micro_batch_size * self.sequence_length * self.world_size
        if self.total_batch_size % unit:
            below = self.total_batch_size // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            raise UserError(
                f"--total-batch-size {self.total_batch_size} is not a multiple of {unit} = micro-batch "
                f"{self.micro_batch_size} x {self.sequence_length} tokens x {self.world_size} ranks: use {nearest}"
            )

    @property
    def sequences_per_step(self) -> int:
        return self.total_batch_size // self.sequence_length

    @property
    def grad_accum_steps(self) -> int:
        return self.sequences_per_step // (self.micro_batch_size * self.world_size)

    def rank_sequences(self, rank: int) -> slice:
        """The sequences of a step, counted from its first, that `rank` computes: a contiguous share."""
        share = self.micro_batch_size * self.grad_accum_steps
        return slice(rank * share, (rank + 1) * share)


def permute(index: Indices, *, n: int, seed: int, epoch: int) -> Indices:
    """The places of `index` (any shape, values in [0, n)) in the order of `epoch`: a keyed permutation of [0, n).

    A Feistel network over the next even power of two, applied again while it lands outside [0, n) (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains", cycle walking). Random access, no table, cost independent of `n`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha512(f"gpt2_ddp {seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8")[:FEISTEL_ROUNDS]
    places = index.astype(np.uint64)
    outside = np.ones(places.shape, dtype=bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        places[outside] = left << half | right
        outside = places >= n
    return places.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input reaches every bit out."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Windows:
    """All windows of `sequence_length + 1` tokens of some shards, in file order; none crosses a shard's end.

    Neighbours share one token: the last target of one is the first input of the next.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        counts = [max(0, shard.tokens - 1) // sequence_length for shard in shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._begins = self._ends - counts
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(lambda number: OpenShard(shards[number]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, windows: Indices) -> Tensor:
        """The tokens of `windows` (n,) as int64 (n, sequence_length + 1).

        Raises:
            UserError: where a token is past the vocabulary, naming the shard.
        """
        numbers = np.searchsorted(self._ends, windows, side="right")
        firsts = ((windows - self._begins[numbers]) * self.sequence_length).tolist()
        opened = [self._opened(number) for number in numbers.tolist()]
        tokens = np.empty((len(windows), self.sequence_length + 1), "<u2")
        for shard, first in zip(opened, firsts, strict=True):
            shard.expect(first, tokens.shape[1])
        for shard, first, row in zip(opened, firsts, tokens, strict=True):
            shard.read(first, row)
            check_tokens(shard.shard, row, first)
        return torch.from_numpy(tokens.astype(np.int64))


def require_one_step(windows: Windows, plan: BatchPlan) -> None:
    """Raise a ValueError where the data has fewer windows than one step consumes, with flags that it is enough for."""
    if len(windows) < plan.sequences_per_step:
        ranks, most = plan.world_size, max(plan.world_size, len(windows))
        length = plan.sequence_length if most == len(windows) else (max(s.tokens for s in windows.shards) - 1) // ranks
        micro = min(plan.micro_batch_size, most // ranks)
        total = most // (micro * ranks) * micro * ranks * length
        flags = f"--sequence-length {length} --micro-batch-size {micro} --total-batch-size {total}"
        raise UserError(
            f"{windows.shards[0].path.parent} holds {len(windows)} training windows of {plan.sequence_length} tokens, "
            f"and one step needs {plan.sequences_per_step}: prepare more data{f', or give {flags}' if length else ''}"
        )


def fingerprint(shards: Sequence[Shard]) -> str:
    """Hex SHA-256 of what the data is: of each shard in order its token count, head, tail and blocks between.

    Wherever the directory lies the answer is the same. The cost per shard is constant.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.tokens.to_bytes(8, "little"))
        opened, block = OpenShard(shard), np.empty(min(4096, shard.tokens), "<u2")
        for start in np.linspace(0, shard.tokens - len(block), num=8, dtype=np.int64).tolist():
            opened.read(start, block)
            digest.update(block.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank computes in one step.

    `tokens` is int64 (grad_accum_steps, micro_batch_size, sequence_length + 1); `windows` (sequences_per_step,) are
    the window numbers of the whole step, of all ranks.
    """

    step: int
    windows: Indices
    tokens: Tensor

    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, each (micro_batch_size, sequence_length), of one micro-step after the other."""
        tokens = self.tokens.to(device, non_blocking=True)
        for micro_batch in tokens:
            yield micro_batch[:, :-1], micro_batch[:, 1:]


class TrainData:
    """The batches of one rank for its device, read ahead by a thread of its own, which ends with `close` or `with`."""

    def __init__(
        self, windows: Windows, plan: BatchPlan, *, rank: int, seed: int, device: torch.device, first_step: int
    ) -> None:
        self.windows, self.plan, self.rank, self.seed = windows, plan, rank, seed
        self.pin_memory = device.type == "cuda"
        self._next_step = first_step
        self._waited = 0.0
        # a new thread's GPU is number 0, by way of which it would pin memory
        choose = partial(torch.cuda.set_device, device) if self.pin_memory else None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=choose)
        self._ahead: deque[Future[StepBatch]] = deque()

    def step_windows(self, step: int) -> Indices:
        """The windows (sequences_per_step,) that update `step`, counted from 1, consumes."""
        count, n = self.plan.sequences_per_step, len(self.windows)
        sequences = np.arange((step - 1) * count, step * count, dtype=np.int64)
        epochs = sequences // n
        order = np.empty_like(sequences)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order[here] = permute(sequences[here] % n, n=n, seed=self.seed, epoch=int(epoch))
        return order

    def load(self, step: int) -> StepBatch:
        """This rank's batch of `step`, read now."""
        windows = self.step_windows(step)
        read = self.windows.read(windows[self.plan.rank_sequences(self.rank)])
        tokens = read.pin_memory() if self.pin_memory else read
        shape = (self.plan.grad_accum_steps, self.plan.micro_batch_size, self.plan.sequence_length + 1)
        return StepBatch(step=step, windows=windows, tokens=tokens.view(shape))

    def next(self) -> StepBatch:
        """The batch of the next step.

        Raises:
            OneRankError: where the data cannot be read, with the reason.
        """
        while len(self._ahead) <= PREFETCH:
            self._ahead.append(self._reader.submit(self.load, self._next_step))
            self._next_step += 1
        start = time.perf_counter()
        try:
            return self._ahead.popleft().result()
        except (ValueError, OSError) as error:
            if line := user_error(error):
                raise OneRankError(line) from error
            raise
        finally:
            self._waited += time.perf_counter() - start

    def waited(self) -> float:
        """Seconds that `next` has waited for the reader since the last call of this."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def seek(self, step: int) -> None:
        """Go on with the data of `step`; what was read ahead is dropped."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next_step = step

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> TrainData:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chained_hash(previous: str, windows: Indices) -> str:
    """The `data_hash` after a step: SHA-256 over the one before it and the step's window numbers as `<i8`."""
    return hashlib.sha256(previous.encode() + windows.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """The first `val_tokens` of the validation shards in file order, divided over the ranks."""

    windows: Windows
    val_tokens: int
    micro_batch_size: int

    @property
    def sequences(self) -> int:
        return min(len(self.windows), self.val_tokens // self.windows.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens that one validation predicts, whatever the number of ranks."""
        return self.sequences * self.windows.sequence_length

    def batches(self, *, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (at most micro_batch_size, sequence_length) of this rank's share of the windows."""
        mine = np.array_split(np.arange(self.sequences, dtype=np.int64), world_size)[rank]
        for start in range(0, len(mine), self.micro_batch_size):
            tokens = self.windows.read(mine[start : start + self.micro_batch_size])
            yield tokens[:, :-1], tokens[:, 1:]
