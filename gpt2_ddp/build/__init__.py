"""From a `TrainConfig` to a `Run` at the step where training goes on, in three phases."""

from __future__ import annotations

from contextlib import ExitStack

from gpt2_ddp.build.making import make
from gpt2_ddp.build.opening import open_run
from gpt2_ddp.build.settling import settle
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.run import Run


def build_run(config: TrainConfig, context: DistContext, stop: StopRequest, held: ExitStack) -> Run:
    """Build the run, whose directory and DDP `held` lets go in the end; collective.

    Raises:
        UserError: for the user's mistakes, with the same outcome on every rank.
    """
    settled = settle(config, context, held)  # the user's mistakes: flags, data, weights, the old run, the disk
    made = make(settled, context, held)  # a GPU's memory, a checkpoint of other parts; a compiler, which is left out
    return open_run(settled, made, context, stop)  # the disk that takes the log
