"""What the manifest of the data decides of a run, where the flags leave it open."""

from __future__ import annotations

from dataclasses import replace

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.manifest import Manifest
from gpt2_ddp.model.vocabulary import GPT2
from gpt2_ddp.system.errors import UserError


def settle_vocabulary(config: TrainConfig, manifest: Manifest | None) -> TrainConfig:
    """With rows for the tokens of another tokenizer than GPT-2's, where --vocab-size does not say how many.

    Raises:
        UserError: where they are fewer than the tokenizer has ids.
    """
    ids = manifest.vocabulary if manifest else GPT2
    if config.vocab_size is None:
        return config if ids == GPT2 else replace(config, vocab_size=ids.padded)
    if config.vocab_size < ids.size:
        raise UserError(f"--vocab-size {config.vocab_size}: the tokens in {config.data_dir} have {ids.size} ids")
    return config


def settle_validation(config: TrainConfig, manifest: Manifest | None) -> tuple[TrainConfig, list[str]]:
    """Without validation where rank 0's data were prepared so, and `--val-every` is the default."""
    if manifest is None or manifest.documents["val"] or config.val_every != TrainConfig.val_every:
        return config, []
    return replace(config, val_every=0), [f"{config.data_dir} has no validation split: training without validation"]
