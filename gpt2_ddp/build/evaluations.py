"""The evaluations of a run, in the order in which they are made after a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.data.mixture import find_validation, share_validation
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.sources import data_source
from gpt2_ddp.data.tokenizer import tokenizer_of_data
from gpt2_ddp.data.windows import Windows
from gpt2_ddp.evaluation.hellaswag import HellaSwag, read_examples
from gpt2_ddp.evaluation.interface import Evaluation
from gpt2_ddp.evaluation.machine import MachineUse
from gpt2_ddp.evaluation.noise_scale import NoiseScale
from gpt2_ddp.evaluation.reference import OnTrack, Reference, fitting
from gpt2_ddp.evaluation.sampling import Sample
from gpt2_ddp.evaluation.validation import ByteCounts, Validation, find_byte_counts
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """What validations are measured by: the bytes of the tokens, and published runs that this one may be compared with;
    `said` are lines for the person who watches."""

    byte_counts: ByteCounts | None = None
    references: tuple[Reference, ...] = ()
    said: list[str] = field(default_factory=list)


def find_yardsticks(config: TrainConfig) -> Yardsticks:
    """The yardsticks of a run with validations. Runs on rank 0, whose disk alone has to have what is read.

    Raises:
        UserError: where the data's manifest is none.
    """
    if not config.val_every:
        return Yardsticks()
    byte_counts, said = find_byte_counts(config.data_dir, config.shape.vocab_size)
    references = fitting(config.to_json(), data_source(config.data_dir))
    said += [f"reference for validations: {reference.name}, {reference.source}" for reference in references]
    return Yardsticks(byte_counts=byte_counts, references=references, said=said)


def make_evaluations(
    config: TrainConfig, plan: BatchPlan, train: Windows, yardsticks: Yardsticks
) -> Iterator[Evaluation]:
    """What `config` asks for, its data found and checked; `train` are the windows that are trained on.

    Raises:
        UserError: for what is missing, broken or too little.
    """
    length = config.sequence_length
    if config.system_every:
        yield MachineUse(config.system_every, config.out_dir)  # the first, so that it is asked of the steps
    if config.val_every:
        parts = open_validation(config, plan.micro_batch_size)
        track = OnTrack(yardsticks.references, config.to_json())
        yield Validation(every=config.val_every, parts=parts, byte_counts=yardsticks.byte_counts, track=track)
    if config.hellaswag_every:
        examples = read_examples(config.hellaswag_data)
        yield HellaSwag(
            every=config.hellaswag_every,
            examples=examples,
            protocol=config.hellaswag_protocol,
            sequence_length=length,
            tokenizer=tokenizer_of_data(config.data_dir),
        )
    if config.sample_every:
        tokenizer = tokenizer_of_data(config.data_dir)
        yield Sample(every=config.sample_every, seed=config.seed, sequence_length=length, tokenizer=tokenizer)
    if config.noise_scale_every:
        if plan.sequences_per_step < 2:
            raise UserError(
                f"--noise-scale-every compares one sequence with a step, and a step of --total-batch-size "
                f"{config.total_batch_size} is one: give at least {2 * length}, or leave it out"
            )
        metrics = config.out_dir / "metrics.jsonl"
        yield NoiseScale(every=config.noise_scale_every, windows=train, plan=plan, seed=config.seed, metrics=metrics)


def told_of_spikes(evaluations: Iterable[Evaluation], guard: SpikeGuard) -> tuple[Evaluation, ...]:
    """`evaluations`, of which those that look at a step's data know by the run's own `guard` which is next."""
    return tuple(replace(each, guard=guard) if isinstance(each, NoiseScale) else each for each in evaluations)


def open_validation(config: TrainConfig, micro_batch_size: int) -> dict[str, ValidationData]:
    """The validation data of each source, by its path.

    Raises:
        UserError: where the validation shards of one hold not one window.
    """
    parts = share_validation(
        find_validation(config.data_dir),
        sequence_length=config.sequence_length,
        val_tokens=config.val_tokens,
        micro_batch_size=micro_batch_size,
    )
    for name, part in parts.items():
        if not len(part.windows):
            raise UserError(
                f"the validation shards in {name} hold no window of {config.sequence_length} tokens: "
                "prepare more, or switch validation off with --val-every 0"
            )
    return parts
