"""How the tokens of a step are divided."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_ddp.system.errors import UserError


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
