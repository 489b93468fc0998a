"""Text from a model: autoregressive sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

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
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eot: bool = False,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    vocabulary: Vocabulary = GPT2,
) -> Tensor:
    """The prompt and what follows it: (T,) or (B, T) ids -> (B, T + up to `max_new_tokens`) int64 on the CPU.

    Each row is a sample of its own; the rest is as `Continuation` has it, and `Continuation.write`.

    Raises:
        UserError: for an empty prompt, an id that is no token, or a setting out of range.
    """
    _require_count(max_new_tokens)
    drawing = Drawing(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = Continuation(
        model,
        prompt,
        drawing,
        sequence_length=sequence_length,
        autocast=autocast,
        at_most=max_new_tokens,
        vocabulary=vocabulary,
    )
    text.write(max_new_tokens, stop_at_eot=stop_at_eot)
    return text.ids


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the next token is drawn: of the `top_k` likeliest, of these the likeliest that have `top_p` together.

    `temperature` divides the logits before; 0 takes the likeliest token. `top_k` None and `top_p` 1 leave none out.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give a number from 0 (the likeliest token) on")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: give more than 0 and at most 1, which leaves no token out")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token for each row of logits (B, vocabulary): (B,)."""
        if self.temperature < torch.finfo(torch.float32).tiny:
            return logits.argmax(-1)
        logits = logits.nan_to_num(neginf=-math.inf)  # a model that has diverged writes on, and training tells of it
        # The largest logit is taken off first: divided by a tiny temperature, the others may go to -inf, never to NaN.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        candidates = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, candidates = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, candidates = logits.sort(stable=True, dim=-1, descending=True)
        if self.top_p < 1:
            logits = nucleus(logits, self.top_p)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        return (drawn if candidates is None else candidates.gather(1, drawn)).squeeze(1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits (B, n), the largest first, with -inf past the fewest that have a probability of `top_p` together.

    A token stays where those before it have less (Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration", section 3.1), so the likeliest always does. In float64: float32 sums of 50,257 are off by more than
    the least of them.
    """
    before = F.pad(logits.double().softmax(-1).cumsum(-1)[:, :-1], (1, 0))
    return logits.masked_fill(before >= top_p, float("-inf"))


class Continuation:
    """Rows of tokens that a model writes on, (B, T) int64 `ids` on the CPU, and can be given more to write on from.

    Only the last `sequence_length` tokens are looked at, `block_size` if not given: positions past the length of the
    training sequences mean nothing to a model. Draws on the CPU from a generator of its own, so that a seed means the
    same on every device and no other random number changes; the model is left in the mode it was in.

    Raises:
        UserError: for an empty prompt, or an id that is no token.
    """

    def __init__(
        self,
        model: GPT,
        prompt: Tensor | Sequence[int] | Sequence[Sequence[int]],
        drawing: Drawing,
        *,
        sequence_length: int | None = None,
        autocast: AbstractContextManager[object] | None = None,
        at_most: int | None = None,
        vocabulary: Vocabulary = GPT2,
    ) -> None:
        """`at_most` is how many tokens the prompt will get, where that is known: no memory is taken for more. Ids past
        the `vocabulary` are never drawn."""
        ids = torch.as_tensor(prompt, dtype=torch.int64).cpu()
        self.ids = ids[None] if ids.ndim == 1 else ids
        _require_tokens(self.ids, vocabulary.size)
        self._vocabulary = vocabulary
        self.length = min(sequence_length or model.config.block_size, model.config.block_size)
        self._model, self._drawing, self._autocast = model, drawing, autocast or nullcontext()
        self._capacity = self.length if at_most is None else min(self.length, self.ids.shape[1] + at_most)
        self._generator = torch.Generator().manual_seed(drawing.seed)
        self._forget()

    def _forget(self) -> None:
        """Have all that counts read anew."""
        self._cache = [KeyValueCache(self._capacity) for _ in self._model.h]

    def append(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to each row, as if they had been written."""
        added = torch.as_tensor(tokens, dtype=torch.int64).expand(len(self.ids), -1)
        self.ids = torch.cat([self.ids, added], dim=1)

    def write(
        self, max_new_tokens: int, *, stop_at_eot: bool = False, on_token: Callable[[Tensor], bool] = lambda _: False
    ) -> None:
        """Add up to `max_new_tokens` to each row; `on_token` is given each, (B,), when it is in `ids`, and may end it.

        With `stop_at_eot` a row that has ended goes on with end-of-text, and the whole ends when all rows have. An
        exception, Ctrl-C among them, leaves `ids` as far as they were written, and they can be written on.
        """
        _require_count(max_new_tokens)
        ended = torch.zeros(len(self.ids), dtype=torch.bool)
        try:
            with evaluating(self._model), self._autocast:
                for _ in range(max_new_tokens):
                    tokens = self._drawing.draw(self._next_logits(), self._generator)
                    if stop_at_eot:
                        tokens = torch.where(ended, self._vocabulary.eot, tokens)
                        ended |= tokens == self._vocabulary.eot
                    self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
                    if on_token(tokens) or (stop_at_eot and bool(ended.all())):
                        break
        except BaseException:
            self._forget()  # some layers may have read more than others
            raise

    def _next_logits(self) -> Tensor:
        """The logits (B, vocabulary) of what follows the last `length` ids, float32 on the CPU.

        Up to `length` ids only those are read that the cache does not have. Past it the window slides, which moves
        every token to another position, and all of the window is read anew.
        """
        slides = self.ids.shape[1] > self.length
        unread = self.ids[:, -self.length :] if slides else self.ids[:, self._cache[0].length :]
        device = self._model.wte.weight.device
        features = self._model.features(unread.to(device), cache=None if slides else self._cache)
        return self._model.logits(features[:, -1])[:, : self._vocabulary.size].float().cpu()


def _require_tokens(ids: Tensor, size: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"a prompt of shape {tuple(ids.shape)}: give at least one token, as (T,) or (B, T)")
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise UserError(f"the prompt has ids from {int(ids.min())} to {int(ids.max())}: tokens are 0 to {size - 1}")


def _require_count(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise UserError(f"{max_new_tokens} new tokens: give 0 or more")


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
            self.tokenizer.encode_ordinary(self.prompt) or [self.tokenizer.eot_token],  # in another script
            max_new_tokens=NEW_TOKENS,
            top_k=TOP_K,
            seed=self.seed + step,
            sequence_length=self.sequence_length,
            autocast=autocast,
            vocabulary=vocabulary_of(self.tokenizer),
        )
        text = self.tokenizer.decode(tokens[0].tolist())
        return Findings(line=f"step {step} | sample: {text}", values={"text": text})
