"""Scores of endings on devices that are not here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.multiple_choice import Question, score
from gpt2_ddp.model.gpt import GPT, GPTConfig


def test_float64_is_made_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64: nothing is doubled that was not moved before."""
    moved: list[Tensor] = []
    cpu, double = Tensor.cpu, Tensor.double

    def move(tensor: Tensor) -> Tensor:
        moved.append(cpu(tensor))
        return moved[-1]

    def double_what_was_moved(tensor: Tensor) -> Tensor:
        assert any(tensor is other for other in moved)
        return double(tensor)

    monkeypatch.setattr(Tensor, "cpu", move)
    monkeypatch.setattr(Tensor, "double", double_what_was_moved)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)).init_weights(0)
    question = Question(context=[1, 2], endings=[[3], [4], [5], [6, 7]], lengths=[1, 1, 1, 2], label=0)
    scores = score(model, [question], DistContext())
    assert scores.dtype == torch.float64
    assert bool((scores < 0).all())
