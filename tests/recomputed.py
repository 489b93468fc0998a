"""A run from its flags alone, by a few lines that share neither loop nor loader nor optimizer with the trainer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from drivers import warm
from torch import Tensor
from torch.nn import functional as F

from gpt2_ddp.data.order import permute
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import load_model

PLAIN = {
    **warm.TINY,
    "seed": "1337",
    "min-lr": str(float(warm.TINY["max-lr"]) / 10),
    "weight-decay": "0.1",
    "beta1": "0.9",
    "beta2": "0.95",
    "grad-clip": "1",
}
"""The flags of a tiny run, and what the trainer takes for those that it is not given."""
OTHERWISE = {
    "seed": "5",
    "sequence-length": "16",
    "micro-batch-size": "1",
    "total-batch-size": "96",
    "max-steps": "5",
    "warmup-steps": "2",
    "max-lr": "5e-3",
    "min-lr": "2e-3",
    "weight-decay": "3",
    "beta1": "0.7",
    "beta2": "0.8",
    "grad-clip": "0.25",
}
"""No flag of the arithmetic at its default: six micro-steps of one sequence, and every gradient is clipped."""
MUON = {
    "optimizer": "muon",
    "muon-lr": "4e-2",
    "muon-momentum": "0.8",
    "muon-momentum-warmup": "4",
    "muon-weight-decay": "2",
    "schedule": "wsd",
    "cooldown-fraction": "0.5",
    "min-lr": "1e-3",
}
"""Muon for the matrices of the blocks, and a rate that stays until half of the steps are done."""


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """What a run must tell in each step, and what it must hold at its end, float32 by the parameters' names."""

    lines: list[dict[str, object]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)


def token_windows(folder: Path, split: str, length: int) -> list[list[int]]:
    """All windows of a split, read from the bytes of its files."""
    found = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        tokens = np.fromfile(path, "<u2")[512:].tolist()
        found += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    return found


def step_windows(step: int, *, per_step: int, n: int, seed: int) -> list[int]:
    """The numbers of the windows that a step consumes, one after the other (design section 5)."""
    sequences = range((step - 1) * per_step, step * per_step)
    return [int(permute(np.array([s % n]), n=n, seed=seed, epoch=s // n)[0]) for s in sequences]


def learning_rate(step: int, flags: Mapping[str, str]) -> float:
    """Linear to --max-lr, then half a cosine to --min-lr, or (wsd) a line from the last step but some on."""
    last, warmup, high, low = (float(flags[name]) for name in ("max-steps", "warmup-steps", "max-lr", "min-lr"))
    if step <= warmup:
        return high * step / warmup
    if flags.get("schedule") == "wsd":
        line = round(float(flags["cooldown-fraction"]) * last)
        return high + (low - high) * max(0.0, step - (last - line)) / line
    return low + (high - low) * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2


def recompute(config: GPTConfig, flags: Mapping[str, str], data_dir: Path) -> Recomputed:
    """In float64: each step in one pass over all its sequences, PyTorch's loss and PyTorch's own AdamW."""
    length, total, seed = (int(flags[name]) for name in ("sequence-length", "total-batch-size", "seed"))
    windows = token_windows(data_dir, "train", length)
    model = GPT(config).init_weights(seed).double()
    blocks = [p for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("h.")]
    hidden = {parameter: torch.zeros_like(parameter) for parameter in blocks} if "optimizer" in flags else {}
    others = [parameter for parameter in model.parameters() if parameter not in hidden]
    matrices, vectors = ([p for p in others if (p.dim() > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": float(flags["weight-decay"])}, {"params": vectors, "weight_decay": 0.0}],
        betas=(float(flags["beta1"]), float(flags["beta2"])),
        eps=1e-8,
    )
    found, chain = Recomputed(), ""
    for step in range(1, int(flags["max-steps"]) + 1):
        chosen = step_windows(step, per_step=total // length, n=len(windows), seed=seed)
        chain = hashlib.sha256(chain.encode() + np.array(chosen, "<i8").tobytes()).hexdigest()
        batch = torch.tensor([windows[number] for number in chosen])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1.0, float(flags["grad-clip"]) / norm)
        rate = learning_rate(step, flags)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for weight, momentum in hidden.items():
            muon(weight.data, momentum, weight.grad, step, rate / float(flags["max-lr"]), flags)
        told = {"step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm}
        found.lines.append({**told, "tokens_seen": step * total, "data_hash": chain, "skipped": 0})
    for name, parameter in model.named_parameters():
        found.weights[name] = parameter.detach().float()
        if parameter in hidden:
            found.moments[f"{name}.momentum_buffer"] = hidden[parameter].float()
            found.moments[f"{name}.step"] = torch.tensor(float(flags["max-steps"]))
        found.moments.update({f"{name}.{key}": value.float() for key, value in optimizer.state[parameter].items()})
    return found


def muon(
    weight: Tensor, momentum: Tensor, gradient: Tensor, step: int, height: float, flags: Mapping[str, str]
) -> None:
    """In place, by singular values: Nesterov's momentum, its quintic iteration, and a root mean square of 0.2."""
    last, warmup = float(flags["muon-momentum"]), int(flags["muon-momentum-warmup"])
    beta = min(1.0, (step - 1) / warmup) * (last - 0.85) + 0.85
    momentum += (1 - beta) * (gradient - momentum)
    rate = float(flags["muon-lr"]) * height
    weight *= 1 - rate * float(flags["muon-weight-decay"])
    parts = 3 if weight.size(0) == 3 * weight.size(1) else 1  # q, k and v
    for rows, mean in zip(weight.chunk(parts), (beta * momentum + (1 - beta) * gradient).chunk(parts), strict=True):
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows -= rate * 0.2 * max(rows.shape) ** 0.5 * (left * values @ right)


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Each tensor, by the norm of what differs: most agree to 1e-5, a key's bias (a gradient of rounding) to 1e-4."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 3e-4 * float(tensor.norm()), name


def loss_of(path: Path, data_dir: Path, sequences: int) -> float:
    """The loss of a checkpoint over the first sequences of 16 tokens of the validation shard, from the definition."""
    windows = torch.tensor(token_windows(data_dir, "val", 16)[:sequences])
    with torch.no_grad():
        log_likelihood = load_model(path).eval()(windows[:, :-1]).log_softmax(-1).gather(-1, windows[:, 1:, None])
    return -float(log_likelihood.mean())
