"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") as published.

Pre-norm blocks, tanh GELU, biases everywhere, learned positions, and an output head tied to the token embedding.
Parameters carry the names of the original release: `wte`, `wpe`, `h.0.attn.c_attn`, `ln_f`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_ddp.model.kernels import causal_attention, gelu, head_loss, product, recomputed
from gpt2_ddp.model.vocabulary import PADDED_VOCAB_SIZE
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2.

    Ids from `vocabulary.VOCAB_SIZE` on stand for nothing and are never sampled.
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
    "gpt2-mini": GPTConfig(n_layer=6, n_head=6, n_embd=384),
    "gpt2-nano": GPTConfig(n_layer=2, n_head=2, n_embd=64),
}
"""The four published shapes (table 2 of the paper) and two small ones for a laptop."""


def model_config(name: str, *, dropout: float = 0.0) -> GPTConfig:
    """The shape called `name`.

    Raises:
        UserError: where there is no such model.
    """
    if name not in SIZES:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(SIZES)}")
    return replace(SIZES[name], dropout=dropout)


class CausalSelfAttention(nn.Module):
    attend = staticmethod(causal_attention)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, qkv: Tensor) -> Tensor:
        """From what `c_attn` gives, (B, T, 3 n_embd), to what is added to the residual stream, (B, T, n_embd)."""
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads = (batch, length, self.n_head, width // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in torch.split(qkv, width, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return F.dropout(y, dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, hidden: Tensor) -> Tensor:
        """From what `c_fc` gives, (B, T, 4 n_embd), to what is added to the residual stream, (B, T, n_embd)."""
        y = product(self.c_proj, gelu, hidden)
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """The outputs of norms and GELUs are computed again in the backward pass: they are cheap, and half of what would
    have to be kept (`memory.training_memory` counts the rest)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(product(self.attn.c_attn, self.ln_1, x))
        x = x + self.mlp(product(self.mlp.c_fc, self.ln_2, x))
        return x


RunBlock = Callable[..., Tensor]
"""`run_block`, or that compiled."""


def run_block(block: Block, x: Tensor, *, again: bool, random: bool) -> Tensor:
    """block(x), (B, T, n_embd) -> the same; with `again` all of it is computed again in the backward pass, which needs
    `random` where it draws random numbers."""
    return recomputed(block, x, random=random) if again else block(x)


class GPT(nn.Module):
    """The language model; its weights are undefined until `init_weights` or a load.

    With `activation_checkpointing` the backward pass is given nothing of a block but its input, and computes the block
    again (Chen et al. 2016, arXiv:1604.06174) up to the input of its last matmul: two thirds of the forward pass's
    weights, and attention, once more.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        with torch.device("meta"):  # PyTorch's own initialisation would be thrown away
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
            self.ln_f = nn.LayerNorm(config.n_embd)
        self.to_empty(device="cpu")

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

    def features(self, ids: Tensor, run: RunBlock = run_block) -> Tensor:
        """What the head reads: ids (B, T) int64 -> (B, T, n_embd), after the last norm. `run` runs each block.

        Raises:
            UserError: where T is more than `block_size`.
        """
        length = ids.shape[1]
        if length > self.config.block_size:
            raise UserError(f"{length} tokens are more than the model's block_size {self.config.block_size}")
        positions = self.wpe(torch.arange(length, device=ids.device))
        x = F.dropout(self.wte(ids) + positions, self.config.dropout, self.training)
        for block in self.h:
            x = run(block, x, again=self.activation_checkpointing, random=self.config.dropout > 0)
        return self.ln_f(x)

    def logits(self, features: Tensor) -> Tensor:
        """(..., n_embd) -> (..., vocab_size), through the tied head."""
        return F.linear(features, self.wte.weight)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of ids (B, T) or, with targets (B, T), the mean loss in nats, a float32 scalar."""
        features = self.features(ids)
        if targets is None:
            return self.logits(features)
        return head_loss(features.flatten(0, 1), self.wte.weight, targets.flatten())
