"""Muon against PyTorch's, against singular values in closed form, and shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from drivers import warm
from running import final_hashes, metrics
from torch import Tensor, nn

from gpt2_ddp.build.making import start_model
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.shapes import parameter_shapes
from gpt2_ddp.optim import muon
from gpt2_ddp.optim.muon import Muon, MuonAndAdamW, momentum_at, orthogonal

RULE = MuonAndAdamW(
    weight_decay=0.1, beta1=0.9, beta2=0.95, max_lr=1e-2, muon_lr=2e-2, muon_momentum=0.95, muon_momentum_warmup=0,
    muon_weight_decay=0.3,
)  # fmt: skip
RATE = 2e-2


def filled(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(weight: Tensor, *, pieces: int, dtype: torch.dtype, context: DistContext | None = None) -> Muon:
    """Over `weight` alone."""
    group = {"params": [weight], "pieces": pieces, "momentum": 0.95, "momentum_warmup": 0, "weight_decay": 0.3}
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.0)
    made = Muon([group], rest, context or DistContext(), dtype)
    made.state[weight] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}
    made.param_groups[0]["lr"] = RATE
    return made


@pytest.mark.parametrize(("shape", "pieces"), [((16, 16), 1), ((64, 16), 1), ((16, 64), 1), ((48, 16), 3)])
def test_each_matrix_is_updated_as_by_pytorchs_muon_in_bfloat16(shape: tuple[int, int], pieces: int) -> None:
    """q, k and v, the three of a weight of 48 rows, each as a matrix of its own; to the bit."""
    weight = nn.Parameter(filled(shape, 1))
    alone = [nn.Parameter(part.detach().clone()) for part in weight.chunk(pieces)]
    options = {"lr": RATE, "weight_decay": 0.3, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    theirs, mine = torch.optim.Muon(alone, **options), ours(weight, pieces=pieces, dtype=torch.bfloat16)
    for seed in range(2, 6):
        weight.grad = filled(shape, seed)
        for part, gradient in zip(alone, weight.grad.chunk(pieces), strict=True):
            part.grad = gradient.clone()
        theirs.step()
        mine.step()
    assert torch.equal(torch.cat(alone), weight)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_in_float32_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Five times a s + b s^3 + c s^5 of each singular value, from those of a matrix of norm 1, in float64."""
    matrix = filled(shape, 3)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.5 < values.min() < values.max() < 1.3
    np.testing.assert_allclose(orthogonal(matrix, torch.float32).numpy(), left * values @ right, rtol=0, atol=1e-4)
    assert not orthogonal(torch.zeros(shape), torch.float32).any()


def test_it_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = RULE.make(model, DistContext())
    found = [({names[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]
    each = [f"h.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    expected = [set(each), {f"h.{layer}.attn.c_attn.weight" for layer in (0, 1)}, {"wte.weight", "wpe.weight"}]
    expected.append(set(names.values()) - set().union(*expected))
    assert [taken for taken, _ in found] == expected
    assert [group.get("pieces") for _, group in found] == [1, 3, None, None]
    assert [group["weight_decay"] for _, group in found] == [0.3, 0.3, 0.1, 0.0]
    assert [group.get("lr_factor", 1.0) for _, group in found] == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("matmuls", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_it_multiplies_in_bfloat16_where_the_run_does(
    matmuls: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4, which trains in float16, has no bfloat16."""
    config = TrainConfig(model="gpt2-nano", optimizer="muon", device="cpu")
    model, optimizer = start_model(config, DistContext(), Found(), None, matmuls)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    used: list[torch.dtype] = []
    monkeypatch.setattr(muon, "orthogonal", lambda matrix, dtype: used.append(dtype) or matrix.to(dtype))
    optimizer.step()
    assert set(used) == {expected}


def test_the_momentum_rises_in_a_line() -> None:
    group = {"momentum": 0.95, "momentum_warmup": 300}
    assert [momentum_at(step, group) for step in (1, 151, 301, 10**6)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(1, {"momentum": 0.5, "momentum_warmup": 0}) == 0.5


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_share_the_work_of_gpt2_evenly(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By multiplications; every matrix is one rank's, and the same one is sent by it on all."""
    shapes = [
        shape for name, shape in parameter_shapes(SIZES["gpt2"]).items() if name.startswith("h.") and len(shape) > 1
    ]
    work, senders = [0] * ranks, [list[int]() for _ in range(ranks)]

    class Asked(DistContext):
        def broadcast_from(self, source: int, tensor: Tensor) -> None:
            del tensor
            senders[self.rank].append(source)

    for rank in range(ranks):

        def counted(matrix: Tensor, dtype: torch.dtype, rank: int = rank) -> Tensor:
            small, large = sorted(matrix.shape)
            work[rank] += small * small * (2 * large + small)
            return matrix.to(dtype)

        monkeypatch.setattr(muon, "orthogonal", counted)
        weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        optimizer = ours(weights[0], pieces=1, dtype=torch.float32, context=Asked(rank=rank, world_size=ranks))
        group = optimizer.param_groups[0]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
            optimizer.state[weight] = {"step": torch.zeros(()), "momentum_buffer": torch.empty_like(weight)}
        split = [weight for weight in weights if weight.shape == (2304, 768)]
        optimizer._groups[:] = [
            group | {"params": split, "pieces": 3},
            group | {"params": [weight for weight in weights if weight.shape != (2304, 768)]},
        ]
        optimizer.step()
    assert sum(work) == 12 * (4 * 3 + 2 * 9) * 768**3
    assert max(work) == sum(work) / ranks
    assert senders[1:] == senders[:-1]


SAME = ("--optimizer", "muon", "--muon-lr", "2e-2", "--reproducible", "--max-steps", "8")


def test_any_number_of_ranks_that_changes_at_every_resume_gives_the_same_bits(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    clean, out_dir = warm.clean_run(shared_folder, data_dir, *SAME), tmp_path / "run"
    warm.fork_ranks(2, out_dir, data_dir, *SAME, faults={"stop_after": {"step": 3}})
    warm.fork_ranks(4, out_dir, data_dir, *SAME, faults={"stop_after": {"step": 5}})
    warm.train(out_dir, data_dir, *SAME)
    assert final_hashes(out_dir) == final_hashes(clean)
    plain = warm.clean_run(shared_folder, data_dir, *SAME[4:])
    assert [line["loss"] for line in metrics(clean)] != [line["loss"] for line in metrics(plain)]


def test_another_optimizer_in_the_same_run_is_refused_with_the_way_to_it(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    clean = warm.clean_run(shared_folder, data_dir, *SAME)
    done = warm.train(clean, data_dir, *SAME, "--optimizer", "adamw", status=2)
    mend = f"Choose another --out-dir, with --init-from {clean} to begin with its weights"
    assert done.stderr == f"error: {clean} is another run: --optimizer is adamw, the run has muon. {mend}\n"
    warm.train(tmp_path / "run", data_dir, "--init-from", str(clean), "--max-steps", "1")
