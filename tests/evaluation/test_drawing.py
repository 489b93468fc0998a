"""Tokens drawn of logits that no sound model gives."""

from __future__ import annotations

import math

import pytest
import torch

from gpt2_ddp.evaluation.sampling import Drawing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_has_diverged_writes_on(value: float) -> None:
    logits = torch.tensor([[0.5, 1.0, 2.0], [value, 0.0, 0.0], [value] * 3])[: 2 if value == -math.inf else 3]
    for drawing in (Drawing(), Drawing(top_k=2), Drawing(top_p=0.9), Drawing(temperature=0.0)):
        drawn = drawing.draw(logits, torch.Generator().manual_seed(0))
        assert drawn.shape == (len(logits),)
        assert ((drawn >= 0) & (drawn < 3)).all()
