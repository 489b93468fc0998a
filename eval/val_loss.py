"""`python -m eval val-loss`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from eval.model_choice import ModelChoice, OpenModel, open_model
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.data.mixture import find_validation, share_validation
from gpt2_ddp.data.sources import METAVAR, DataDir, shown
from gpt2_ddp.data.tokenizer import require_same_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.validation import event_values, find_byte_counts, loss_by_source
from gpt2_ddp.model.gpt import GPTConfig
from gpt2_ddp.model.head import LARGE_MEMORY, head_rows_for
from gpt2_ddp.model.memory import USABLE
from gpt2_ddp.model.shapes import block_matrix_size
from gpt2_ddp.system.control_groups import available_memory
from gpt2_ddp.system.errors import UserError

BUSY_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens in a micro-batch past which a device is expected to work no faster."""


UNKNOWN_TOKENIZER = "no bits per byte: neither the model nor the data says whose tokens they are"


@dataclass(frozen=True, kw_only=True)
class ValLoss(ModelChoice):
    """Loss on validation shards, a token and a byte of text, over the same tokens whatever the number of ranks."""

    data_dir: Annotated[DataDir, tyro.conf.arg(metavar=METAVAR)] = TrainConfig.data_dir
    """Folder of token shards, as `python -m data_prep` makes it; or several and their weights, as A:0.7 B:0.3."""
    val_tokens: int = TrainConfig.val_tokens
    """Tokens to predict, from the start of the validation shards; at most what they hold. Of several folders each is
    asked for its share, by weight, and has a loss of its own beside that of all."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences that one rank computes at once; auto takes as many as keep the device busy and fit in memory."""

    def run(self) -> None:
        """Print the loss, and write the JSON if asked to."""
        if self.micro_batch_size != "auto" and self.micro_batch_size < 1:
            raise UserError(f"--micro-batch-size {self.micro_batch_size}: give 1 or more")
        shards = find_validation(self.data_dir)
        with open_model(self) as opened:
            length, size = opened.sequence_length, self.micro_batch_size
            parts = share_validation(
                shards,
                sequence_length=length,
                val_tokens=self.val_tokens,
                micro_batch_size=chosen_micro_batch(opened) if size == "auto" else size,
            )
            for name, part in parts.items():
                if part.sequences < 1:
                    raise UserError(
                        f"not one sequence of {length} tokens in --val-tokens {self.val_tokens} and the validation "
                        f"shards of {name}: give a smaller --sequence-length"
                    )
            context = opened.context
            vocab_size = opened.gpt.config.vocab_size
            known = context.run_on_all(lambda: require_same_tokenizer(opened.path, self.data_dir, rows=vocab_size))
            if not known:
                context.run_on_all(lambda: require_ids(parts, vocab_size, context))
            byte_counts, said = context.run_on_main(
                lambda: find_byte_counts(self.data_dir, vocab_size) if known else (None, [UNKNOWN_TOKENIZER])
            )
            for line in said:
                opened.warn(line)
            autocast = opened.precision.autocast()
            found, by_source = loss_by_source(opened.gpt, parts, context, autocast, byte_counts)
            values = event_values(found, parts, by_source)
            perplexity = math.exp(min(found.val_loss, 700.0))
            bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits a byte,"
            opened.say(
                f"{opened.path}: validation loss {found.val_loss:.4f} nats a token (perplexity {perplexity:.2f}){bits} "
                f"over {values['tokens']} tokens of {shown(self.data_dir)}, {length} at a time"
            )
            for name, own in by_source.items():
                if len(by_source) > 1:
                    opened.say(f"{name}: {own.val_loss:.4f} nats a token over {parts[name].tokens} tokens")
            opened.write_json(self.json, values)


def require_ids(parts: Mapping[str, ValidationData], rows: int, context: DistContext) -> None:
    """
    Raises:
        UserError: where this rank's share of a source has an id past the model's `rows` token embeddings.
    """
    for name, part in parts.items():
        for inputs, targets in part.batches(rank=context.rank, world_size=context.world_size):
            if (largest := int(torch.maximum(inputs.max(), targets.max()))) >= rows:
                raise UserError(
                    f"{name} has the token id {largest}, and the model {rows} token embeddings: prepare the text with "
                    "the model's tokenizer"
                )


def chosen_micro_batch(opened: OpenModel) -> int:
    """The micro-batch of `largest_micro_batch` for this rank's device and what is free of its memory."""
    device = opened.context.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory() // opened.context.local_world_size
    return largest_micro_batch(
        opened.gpt.config,
        sequence_length=opened.sequence_length,
        dtype=opened.precision.dtype,
        device_type=device.type,
        memory=free,
    )


def largest_micro_batch(
    config: GPTConfig, *, sequence_length: int, dtype: torch.dtype, device_type: str, memory: int
) -> int:
    """The largest power of two of sequences, up to `BUSY_TOKENS`, whose forward pass fits in `memory` bytes; or one."""
    size = 1
    while 2 * size * sequence_length <= BUSY_TOKENS.get(device_type, BUSY_TOKENS["cpu"]):
        needed = forward_memory(config, 2 * size * sequence_length, dtype=dtype, device_type=device_type)
        if needed > USABLE.get(device_type, USABLE["cpu"]) * memory:
            break
        size *= 2
    return size


def forward_memory(config: GPTConfig, tokens: int, *, dtype: torch.dtype, device_type: str) -> int:
    """Bytes beside the weights that a forward pass without gradients holds at most, by what lives when it holds most.

    The matrices in `dtype`, where that is not float32; and of a block for each token, in units of n_embd, the residual
    stream in float32 before and after, GELU's input and output, and what the MLP gives. The head has the features in
    both formats, a chunk's logits in both, and their logarithms of probabilities. What attention in bfloat16 takes on
    a CPU comes on top.
    """
    width, mixed = dtype.itemsize, dtype != torch.float32
    matrices = config.n_layer * block_matrix_size(config) + config.vocab_size * config.n_embd
    rows = min(tokens, head_rows_for(device_type, LARGE_MEMORY))
    block = tokens * config.n_embd * (2 * 4 + (4 + 4 + 1) * width)
    head = tokens * config.n_embd * (2 * 4 + width) + rows * config.vocab_size * (2 * 4 + width * mixed)
    return width * matrices * mixed + max(block, head)
