"""Updates against AdamW written out from its paper, and those that are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt2_ddp.build.rules import optimizer_rule
from gpt2_ddp.checkpoint.state import weights_and_moments
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.optim.optimizers import OPTIMIZERS, load_optimizer_tensors, optimizer_tensors
from gpt2_ddp.optim.rule import AdamW, OptimizerRule, parameter_groups
from gpt2_ddp.optim.schedules import SCHEDULES
from gpt2_ddp.optim.updates import SkipCount, apply_update, set_learning_rate

CPU = torch.device("cpu")
ALONE = DistContext()
BETAS = (0.9, 0.95)
DECAY = 0.1
ADAMW = AdamW(weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1])
Spoil = Callable[[list[nn.Parameter]], Tensor]


def small_model(seed: int = 0) -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=8)).init_weights(seed)


def scaler_of(*, enabled: bool) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10)


def put_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def copied(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    everything = weights_and_moments(model, optimizer)
    return {name: tensor.detach().clone() for name, tensor in everything.items()}


def assert_same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


def test_only_matrices_and_embeddings_decay() -> None:
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, DECAY))
    assert [group["weight_decay"] for group in parameter_groups(model, DECAY)] == [DECAY, 0.0]
    linear = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert decayed == ["wte.weight", "wpe.weight", *(f"h.0.{name}.weight" for name in linear)]
    assert set(rest) == {name for name in names.values() if name.endswith("bias") or "ln_" in name}
    assert len(decayed) + len(rest) == len(names)


def adamw(
    weight: np.ndarray, gradients: list[np.ndarray], rates: list[float], *, decay: float, clips: list[float]
) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2 with decoupled decay, in float64."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, (gradient, rate, clip) in enumerate(zip(gradients, rates, clips, strict=True), start=1):
        gradient = gradient * clip
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        unbiased = mean / (1 - BETAS[0] ** t), square / (1 - BETAS[1] ** t)
        weight = weight - rate * decay * weight - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return weight


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_updates_are_adamw(scaled: bool, grad_clip: float) -> None:
    model = small_model()
    optimizer = ADAMW.make(model, ALONE)
    scaler = scaler_of(enabled=scaled)
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in before}
    rates, clips = [1e-2, 2e-2, 5e-3], []
    for number, rate in enumerate(rates):
        put_gradients(model, number, scale=0.01 if number == 1 else 1.0)  # the second is too small to be clipped
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.double().numpy().copy())
            parameter.grad *= scaler.get_scale() if scaled else 1.0
        expected = math.sqrt(sum(float((taken[-1] ** 2).sum()) for taken in gradients.values()))
        clips.append(min(1.0, grad_clip / expected) if grad_clip else 1.0)
        if scaled:
            scaler.scale(torch.tensor(1.0))  # as the loss is, before the backward pass
        set_learning_rate(optimizer, rate)
        norm, skipped = apply_update(optimizer, scaler, loss=torch.tensor(2.0), grad_clip=grad_clip)
        assert float(norm) == pytest.approx(expected, rel=1e-5)
        assert not skipped
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        decay = DECAY if parameter.dim() > 1 else 0.0
        wanted = adamw(before[name], gradients[name], rates, decay=decay, clips=clips)
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=2e-5, atol=2e-6, err_msg=name)


class MomentumStep(torch.optim.Optimizer):
    """Heavy-ball momentum (Polyak 1964) in plain Python, which knows nothing of `found_inf`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                velocity = self.state[parameter]["velocity"]
                velocity.mul_(0.9).add_(parameter.grad + group["weight_decay"] * parameter)
                parameter.sub_(group["lr"] * velocity)


@dataclass(frozen=True, kw_only=True)
class Momentum(OptimizerRule):
    def over(self, groups: list[dict[str, Any]], context: DistContext, dtype: torch.dtype) -> torch.optim.Optimizer:  # noqa: ARG002
        return MomentumStep(groups, {"lr": 0.0})

    def first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        return {"velocity": torch.zeros_like(parameter)}


def nan_in_one_gradient(parameters: list[nn.Parameter]) -> Tensor:
    parameters[3].grad.view(-1)[1] = math.nan
    return torch.tensor(1.0)


def inf_in_one_gradient(parameters: list[nn.Parameter]) -> Tensor:
    parameters[-1].grad.view(-1)[0] = -math.inf
    return torch.tensor(1.0)


def nan_loss(_: list[nn.Parameter]) -> Tensor:
    return torch.tensor(math.nan)


def inf_loss(_: list[nn.Parameter]) -> Tensor:
    return torch.tensor(math.inf)


@pytest.mark.parametrize("spoil", [nan_in_one_gradient, inf_in_one_gradient, nan_loss, inf_loss])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("first", [True, False], ids=["first-update", "later-update"])
@pytest.mark.parametrize(
    "rule",
    [ADAMW, Momentum(weight_decay=DECAY), optimizer_rule(TrainConfig(optimizer="muon"))],
    ids=["fused AdamW", "momentum in Python", "Muon"],
)
def test_a_bad_update_leaves_everything_as_if_it_had_not_been(
    rule: OptimizerRule, scaled: bool, spoil: Spoil, first: bool
) -> None:
    finals = []
    for spoiled in (False, True):
        model, scaler = small_model(), scaler_of(enabled=scaled)
        optimizer = rule.make(model, ALONE)
        set_learning_rate(optimizer, 1e-2)

        def update(seed: int, spoil: Spoil | None, model=model, scaler=scaler, optimizer=optimizer) -> bool:
            scaler.scale(torch.tensor(1.0))
            put_gradients(model, seed, scale=scaler.get_scale() if scaler.is_enabled() else 1.0)
            loss = spoil(list(model.parameters())) if spoil else torch.tensor(1.0)
            return bool(apply_update(optimizer, scaler, loss=loss, grad_clip=1.0)[1])

        if not first:
            assert not update(1, None)
        if spoiled:
            before, scale = copied(model, optimizer), scaler.get_scale()
            assert update(2, spoil)
            after = {name: tensor for name, tensor in copied(model, optimizer).items() if name in before}
            assert_same_bytes(before, after)
            assert scaler.get_scale() == (scale / 2 if scaled else scale)
        assert not update(3, None)
        finals.append(copied(model, optimizer))
    assert_same_bytes(*finals)


def test_the_state_travels_by_the_names_of_the_parameters() -> None:
    model, scaler = small_model(), scaler_of(enabled=False)
    optimizer = ADAMW.make(model, ALONE)
    put_gradients(model, 1)
    apply_update(optimizer, scaler, loss=torch.tensor(1.0), grad_clip=1.0)
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(state) == {f"{name}.{kind}" for name, _ in model.named_parameters() for kind in kinds}
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    other = ADAMW.make(twin, ALONE)
    load_optimizer_tensors(twin, other, state)
    for each, theirs in ((model, optimizer), (twin, other)):
        put_gradients(each, 2)
        theirs.param_groups[0]["lr"] = 1e-2
        apply_update(theirs, scaler, loss=torch.tensor(1.0), grad_clip=1.0)
    assert_same_bytes(copied(model, optimizer), copied(twin, other))


@pytest.mark.parametrize("name", ["wte.weigth.exp_avg", "module.wte.weight.exp_avg", "ln_f.weight.exp_avg"])
def test_a_state_that_fits_no_parameter_is_refused(name: str) -> None:
    model = small_model()
    optimizer = ADAMW.make(model, ALONE)
    with pytest.raises(ValueError, match=f"{name} .*fits no parameter"):
        load_optimizer_tensors(model, optimizer, {name: torch.zeros(32, 8)})


def test_skips_are_counted_in_all_and_in_a_row() -> None:
    skips = SkipCount(CPU)
    skips.load_state_dict({"skipped": 5, "skipped_in_a_row": 0})
    found = []
    for skipped in (True, True, False, True):
        skips.add(torch.tensor(skipped))
        found.append((skips.total(), skips.state_dict()["skipped_in_a_row"]))
    assert found == [(6, 1), (7, 2), (7, 0), (8, 1)]
    assert skips.longest() == 2


def test_the_names_that_the_command_line_takes_are_those_of_the_registries() -> None:
    assert set(get_args(get_type_hints(TrainConfig)["optimizer"])) == OPTIMIZERS.keys()
    assert set(get_args(get_type_hints(TrainConfig)["schedule"])) == SCHEDULES.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_holds_what_is_reckoned_for_it_from_before_its_first_step(name: str) -> None:
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=64)).init_weights(0)
    rule = optimizer_rule(TrainConfig(optimizer=name))
    optimizer = rule.make(model, ALONE)
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in optimizer_tensors(model, optimizer).items()}
    held = sum(tensor.nbytes for tensor in optimizer_tensors(model, optimizer).values())
    assert held == rule.state_bytes(model.config)
    put_gradients(model, 1)
    apply_update(optimizer, scaler_of(enabled=False), loss=torch.tensor(1.0), grad_clip=1.0)
    after = {name: (tensor.dtype, tensor.shape) for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert after == before


def test_a_group_may_have_a_rate_of_its_own() -> None:
    model = small_model()
    optimizer = ADAMW.make(model, ALONE)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr_factor": 0.25})
    set_learning_rate(optimizer, 2e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-2, 2e-2, 5e-3]
