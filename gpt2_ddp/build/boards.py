"""The boards that a run was asked to be shown on."""

from __future__ import annotations

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.metrics.boards import Aside, TensorBoard, WeightsAndBiases


def open_boards(config: TrainConfig, context: DistContext, step: int) -> list[Aside]:
    """The boards that rank 0 was asked to show the run on, which goes on after `step`.

    Raises:
        UserError: where one cannot be opened.
    """
    boards: list[Aside] = []
    out_dir, shown = config.out_dir, config.to_json() | {"world_size": context.world_size}
    if config.tensorboard and context.is_main:
        mend = "its folder in --out-dir must be one that can be written"
        boards.append(Aside("--tensorboard", lambda: TensorBoard(out_dir, resumed_step=step, config=shown), mend))
    if config.wandb and context.is_main:
        mend = "set WANDB_API_KEY, or log in by `wandb login`, or set WANDB_MODE=offline"
        boards.append(Aside("--wandb", lambda: WeightsAndBiases(out_dir, config=shown), mend))
    return boards
