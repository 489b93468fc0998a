"""Text from a model: autoregressive sampling."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gpt2_ddp.data.tokenizer import Tokenizer, vocabulary_of
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.inference import evaluating
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.model.attention import KeyValueCache
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.vocabulary import GPT2, Vocabulary
from gpt2_ddp.system.errors import UserError

PROMPT = "Language is"
NEW_TOKENS, TOP_K = 48, 50
"""Of a sample during training."""


def generate(
    model: GPT,
    prompt: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_at_eot: bool = False,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    vocabulary: Vocabulary = GPT2,
) -> Tensor:
    """The prompt and what follows it: (T,) or (B, T) ids -> (B, T + up to `max_new_tokens`) int64 on the CPU.

    Each row is a sample of its own. Only the last `sequence_length` tokens are looked at, `block_size` if not given:
    positions past the length of the training sequences mean nothing to a model. `temperature` 0 takes the likeliest
    token; `top_k` draws among the k likeliest; ids past the `vocabulary` are never drawn. With `stop_at_eot` a row that
    has ended goes on with end-of-text, and the whole ends when all rows have.

    Draws on the CPU from a generator of its own, so that `seed` means the same on every device and no other random
    number changes; the model is left in the mode it was in.

    Raises:
        UserError: for an empty prompt, an id that is no token, or a setting out of range.
    """
    ids = torch.as_tensor(prompt, dtype=torch.int64).cpu()
    ids = ids[None] if ids.ndim == 1 else ids
    _check(ids, vocabulary.size, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    length = min(sequence_length or model.config.block_size, model.config.block_size)
    cache = [KeyValueCache(min(length, ids.shape[1] + max_new_tokens)) for _ in model.h]
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    with evaluating(model), autocast or nullcontext():
        for _ in range(max_new_tokens):
            tokens = _draw(_next_logits(model, ids, length, cache)[:, : vocabulary.size], temperature, top_k, generator)
            if stop_at_eot:
                tokens = torch.where(ended, vocabulary.eot, tokens)
                ended |= tokens == vocabulary.eot
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            if stop_at_eot and bool(ended.all()):
                break
    return ids


def _check(ids: Tensor, tokens: int, *, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"a prompt of shape {tuple(ids.shape)}: give at least one token, as (T,) or (B, T)")
    if int(ids.min()) < 0 or int(ids.max()) >= tokens:
        raise UserError(f"the prompt has ids from {int(ids.min())} to {int(ids.max())}: tokens are 0 to {tokens - 1}")
    if max_new_tokens < 0:
        raise UserError(f"{max_new_tokens} new tokens: give 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}: give a number from 0 (the likeliest token) on")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k {top_k}: give 1 or more")


def _next_logits(model: GPT, ids: Tensor, length: int, cache: Sequence[KeyValueCache]) -> Tensor:
    """The logits (B, vocabulary) of what follows the last `length` ids of (B, T), float32 on the CPU.

    Up to `length` ids only those are read that the cache does not have. Past it the window slides, which moves every
    token to another position, and all of the window is read anew.
    """
    slides = ids.shape[1] > length
    unread = ids[:, -length:] if slides else ids[:, cache[0].length :]
    features = model.features(unread.to(model.wte.weight.device), cache=None if slides else cache)
    return model.logits(features[:, -1]).float().cpu()


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (B, vocabulary): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    # The largest logit is taken off first: divided by a tiny temperature, the others may go to -inf, never to NaN.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits, candidates = logits.topk(top_k)
        return candidates.gather(1, torch.multinomial(logits.softmax(-1), 1, generator=generator)).squeeze(1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text during training; rank 0 writes it, the others go ahead and wait in their next collective."""

    name: ClassVar[str] = "sample"
    every: int
    seed: int
    sequence_length: int
    tokenizer: Tokenizer
    prompt: str = PROMPT

    def run(
        self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int
    ) -> Findings | None:
        if not context.is_main:
            return None
        tokens = generate(
            model,
            self.tokenizer.encode_ordinary(self.prompt),
            max_new_tokens=NEW_TOKENS,
            top_k=TOP_K,
            seed=self.seed + step,
            sequence_length=self.sequence_length,
            autocast=autocast,
            vocabulary=vocabulary_of(self.tokenizer),
        )
        text = self.tokenizer.decode(tokens[0].tolist())
        return Findings(line=f"step {step} | sample: {text}", values={"text": text})
