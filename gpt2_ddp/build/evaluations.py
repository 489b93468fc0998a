"""The evaluations of a run, in the order in which they are made after a step."""

from __future__ import annotations

from collections.abc import Iterator

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.data.shards import find_shards
from gpt2_ddp.data.windows import Windows
from gpt2_ddp.evaluation.hellaswag import HellaSwag, read_examples
from gpt2_ddp.evaluation.interface import Evaluation
from gpt2_ddp.evaluation.sampling import Sample
from gpt2_ddp.evaluation.validation import Validation
from gpt2_ddp.system.errors import UserError


def make_evaluations(config: TrainConfig, micro_batch_size: int) -> Iterator[Evaluation]:
    """What `config` asks for, its data found and checked.

    Raises:
        UserError: for what is missing, broken or too little.
    """
    length = config.sequence_length
    if config.val_every:
        data = open_validation(config, micro_batch_size)
        yield Validation(every=config.val_every, data=data)
    if config.hellaswag_every:
        examples = read_examples(config.hellaswag_data)
        yield HellaSwag(
            every=config.hellaswag_every,
            examples=examples,
            protocol=config.hellaswag_protocol,
            sequence_length=length,
        )
    if config.sample_every:
        yield Sample(every=config.sample_every, seed=config.seed, sequence_length=length)


def open_validation(config: TrainConfig, micro_batch_size: int) -> ValidationData:
    """
    Raises:
        UserError: where the validation shards hold not one window.
    """
    windows = Windows(find_shards(config.data_dir, "val"), config.sequence_length)
    if not len(windows):
        raise UserError(
            f"the validation shards in {config.data_dir} hold no window of {config.sequence_length} tokens: "
            "prepare more, or switch validation off with --val-every 0"
        )
    return ValidationData(windows=windows, val_tokens=config.val_tokens, micro_batch_size=micro_batch_size)
