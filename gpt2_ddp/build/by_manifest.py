"""What the manifest of the data decides of a run, where the flags leave it open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.manifest import Manifest
from gpt2_ddp.data.sources import shown
from gpt2_ddp.model.vocabulary import GPT2
from gpt2_ddp.system.errors import UserError

Manifests = Mapping[Path, Manifest | None]
"""Of each source of the data, as rank 0 read them."""


def settle_vocabulary(config: TrainConfig, manifests: Manifests) -> TrainConfig:
    """With rows for the tokens of another tokenizer than GPT-2's, where --vocab-size does not say how many.

    Raises:
        UserError: where they are fewer than the tokenizer has ids.
    """
    first = next(iter(manifests.values()))  # the others have the same
    ids = first.vocabulary if first else GPT2
    if config.vocab_size is None:
        return config if ids == GPT2 else replace(config, vocab_size=ids.padded)
    if config.vocab_size < ids.size:
        raise UserError(f"--vocab-size {config.vocab_size}: the tokens in {shown(config.data_dir)} have {ids.size} ids")
    return config


def settle_validation(config: TrainConfig, manifests: Manifests) -> tuple[TrainConfig, list[str]]:
    """Without validation where data were prepared so, and `--val-every` is the default."""
    without = [path for path, manifest in manifests.items() if manifest and not manifest.documents["val"]]
    if not without or config.val_every != TrainConfig.val_every:
        return config, []
    return replace(config, val_every=0), [f"{without[0]} has no validation split: training without validation"]
