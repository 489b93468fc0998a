"""`python -m eval val-loss`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from eval.model_choice import ModelChoice, open_model
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data import ValidationData, Windows
from gpt2_ddp.shards import find_shards
from gpt2_ddp.validation import validation_loss


@dataclass(frozen=True, kw_only=True)
class ValLoss(ModelChoice):
    """Loss on validation shards, over the same tokens whatever the number of ranks."""

    data_dir: Path = TrainConfig.data_dir
    """Folder of token shards, as `python -m data_prep` makes it."""
    val_tokens: int = TrainConfig.val_tokens
    """Tokens to predict, from the start of the validation shards; at most what they hold."""
    sequence_length: int | None = None
    """Tokens in a sequence: the fewer, the higher the loss; the model's own length if not given."""
    micro_batch_size: int = 4
    """Sequences that one rank computes at once."""

    def run(self) -> None:
        """Print the loss, and write the JSON if asked to."""
        for name, number in (("sequence-length", self.sequence_length), ("micro-batch-size", self.micro_batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"--{name} {number}: give 1 or more")
        shards = find_shards(self.data_dir, "val")
        with open_model(self) as opened:
            length = self.sequence_length or opened.gpt.config.block_size
            if length > opened.gpt.config.block_size:
                raise ValueError(f"--sequence-length {length} is past the model's {opened.gpt.config.block_size}")
            windows = Windows(shards, length)
            data = ValidationData(windows=windows, val_tokens=self.val_tokens, micro_batch_size=self.micro_batch_size)
            if data.sequences < 1:
                raise ValueError(
                    f"not one sequence of {length} tokens in --val-tokens {self.val_tokens} and the validation "
                    f"shards of {self.data_dir}: give a smaller --sequence-length"
                )
            context = opened.context
            batches = data.batches(rank=context.rank, world_size=context.world_size)
            loss = validation_loss(opened.gpt, batches, context, opened.precision.autocast())
            perplexity = math.exp(min(loss, 700.0))
            opened.say(
                f"{opened.path}: validation loss {loss:.4f} nats a token (perplexity {perplexity:.2f}) "
                f"over {data.tokens} tokens of {self.data_dir}"
            )
            opened.write_json(self.json, {"val_loss": loss, "tokens": data.tokens})
