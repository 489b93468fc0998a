"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") as published.

Pre-norm blocks, tanh GELU, biases everywhere, learned positions, and an output head tied to the token embedding.
Parameters carry the names of the original release: `wte`, `wpe`, `h.0.attn.c_attn`, `ln_f`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_ddp.model.attention import KeyValueCache, causal_attention
from gpt2_ddp.model.head import head_loss
from gpt2_ddp.model.layers import GELU, LayerNorm
from gpt2_ddp.model.recomputation import run_block
from gpt2_ddp.model.vocabulary import PADDED_VOCAB_SIZE
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2.

    `vocab_size` counts the rows of the token embedding; those past the tokenizer's ids stand for nothing and are never
    sampled.
    """

    block_size: int = 1024
    vocab_size: int = PADDED_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations that training spends on one token, forward and backward, matmuls only.

        A matmul with P weights costs 2P forward and 4P backward; attention's two products cost 4 T C forward and
        twice that backward, counted in full although half of them is masked (Chowdhery et al. 2022, PaLM, app. B).
        """
        weights = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * sequence_length


SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
    "gpt2-mini": GPTConfig(n_layer=6, n_head=6, n_embd=384),
    "gpt2-micro": GPTConfig(n_layer=4, n_head=4, n_embd=256),
    "gpt2-nano": GPTConfig(n_layer=2, n_head=2, n_embd=64),
}
"""The four published shapes (table 2 of the paper), the one distilled from the first, and three for a laptop."""


def model_config(name: str, *, dropout: float = 0.0, vocab_size: int | None = None) -> GPTConfig:
    """The shape called `name`, for GPT-2's vocabulary or with `vocab_size` rows of the token embedding.

    Raises:
        UserError: where there is no such model.
    """
    if name not in SIZES:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(SIZES)}")
    shape = replace(SIZES[name], dropout=dropout)
    return shape if vocab_size is None else replace(shape, vocab_size=vocab_size)


RunBlock = Callable[..., Tensor]
"""`run_block`, or that compiled."""


class GPT(nn.Module):
    """The language model; its weights are undefined until `init_weights` or a load, and mere shapes on `meta`.

    With `activation_checkpointing` the backward pass is given nothing of a block but its input, and computes the block
    again: two thirds of the forward pass's weights, and attention, once more.
    """

    def __init__(self, config: GPTConfig, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        with torch.device("meta"):  # PyTorch's own initialisation would be thrown away, and import the compiler
            wte, wpe = (torch.empty(rows, config.n_embd) for rows in (config.vocab_size, config.block_size))
            self.wte = nn.Embedding.from_pretrained(wte, freeze=False)  # type: ignore[no-untyped-call]
            self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)  # type: ignore[no-untyped-call]
            self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
            self.ln_f = nn.LayerNorm(config.n_embd)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of ids (B, T) or, with targets (B, T), the mean loss in nats, a float32 scalar."""
        features = self.features(ids)
        if targets is None:
            return self.logits(features)
        return head_loss(features.flatten(0, 1), self.wte.weight, targets.flatten())

    def features(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
        run: RunBlock = run_block,
    ) -> Tensor:
        """What the head reads: ids (B, T) int64 -> (B, T, n_embd), after the last norm.

        With a `cache` of each layer the ids go on from those that it has, and are added to it. `positions`, int64 and
        broadcast to (B, T), are 0 to T - 1 or, with a cache, the next ones. Each position sees itself and those before
        it or, with a boolean `mask` broadcast to (B, n_head, T, positions seen), what that says. `run` runs each block.

        Raises:
            UserError: where there would be more positions than `block_size`.
        """
        if positions is None:
            start = cache[0].length if cache else 0
            positions = self._positions(start, start + ids.shape[1])
        x = F.dropout(self.wte(ids) + self.wpe(positions), self.config.dropout, self.training)
        again, random = self.activation_checkpointing, self.config.dropout > 0
        for layer, block in enumerate(self.h):
            x = run(block, x, mask, cache[layer] if cache else None, again=again, random=random)
        return self.ln_f(x)

    def _positions(self, start: int, end: int) -> Tensor:
        if end > self.config.block_size:
            raise UserError(f"{end} tokens are more than the model's block_size {self.config.block_size}")
        return torch.arange(start, end, device=self.wpe.weight.device)

    def logits(self, features: Tensor) -> Tensor:
        """(..., n_embd) -> (..., vocab_size), through the tied head."""
        return F.linear(features, self.wte.weight)

    def init_weights(self, seed: int) -> GPT:
        """Draw the weights that training starts from, the same on every machine and rank.

        N(0, 0.02) for matrices and `wte`, N(0, 0.01) for `wpe`, zero biases, and the projections that write to the
        residual stream scaled by 1/sqrt(2 n_layer) (GPT-2 paper, section 2.3; deviations from the released code).
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif ".ln_" in f".{name}":
                    parameter.fill_(1.0)
                else:
                    std = {"wpe.weight": 0.01}.get(name, residual_std if name.endswith("c_proj.weight") else 0.02)
                    parameter.normal_(0.0, std, generator=generator)
        return self


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    attend = staticmethod(causal_attention)
    """How attention is computed of q, k and v: `bench.ladder` puts other functions of this signature in its place."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T, n_embd) -> the same; `mask` and `cache` as `GPT.features` has them."""
        dropout = self.dropout if self.training else 0.0
        heads = (*x.shape[:2], self.n_head, x.shape[2] // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(x.shape[2], dim=2))
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, mask=mask, dropout=dropout)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return F.dropout(y, dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, n_embd) -> the same."""
        y = self.c_proj(self.gelu(self.c_fc(x)))
        return F.dropout(y, self.dropout, self.training)
