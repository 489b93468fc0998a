"""The fifteen parts, in the order in which a GPU that is lent for twenty minutes should answer them."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  so that the parts, which are forked, have it

from gpt2_ddp.data.tokenizer import tokenizer_files
from gpu import correctness, measurements
from gpu.runner import Part
from gpu.scene import GPUS, warm_up_wiring


def shared_vocabulary() -> None:
    """Read the tokenizer's files once for all parts."""
    tokenizer_files()


__all__ = ["GPUS", "PARTS", "warm_up_wiring"]

shared_vocabulary()
WORK = (
    ("versions and attention", correctness.versions_and_attention),
    ("tests/end_to_end/test_cuda.py", correctness.cuda_tests),
    ("compilations after the warm-up", correctness.recompilations),
    ("waiting for the device in a step", correctness.waiting),
    ("steady state", measurements.steady_state),
    ("--reproducible", correctness.reproducible),
    ("rows of the head", measurements.rows_of_the_head),
    ("DDP over NCCL, one rank", correctness.forced_ddp),
    ("memory against what is reckoned", measurements.memory_against_reckoned),
    ("--micro-batch-size auto", measurements.automatic_micro_batch),
    ("float16 against bfloat16", correctness.half_precision),
    ("sampling and HellaSwag", measurements.evaluations),
    ("saving", measurements.saving),
    ("the speed ladder", measurements.speed_ladder),
    ("1558M", measurements.largest_model),
)
PARTS = tuple(Part(number=number, title=title, work=work) for number, (title, work) in enumerate(WORK, start=1))
