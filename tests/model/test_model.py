"""`GPT` is GPT-2: against transformers' implementation, the published counts and the definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_ddp.model.attention import KeyValueCache
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig, model_config
from gpt2_ddp.model.huggingface import from_hf
from gpt2_ddp.model.shapes import parameter_shapes

WIDTHS_AND_HEADS = [(768, 12), (1024, 16), (1280, 20), (1600, 25)]


def both(n_embd: int, n_head: int, n_layer: int) -> tuple[GPT, GPT2LMHeadModel]:
    """The same random weights, none of them zero or one, in our model and in transformers'."""
    sizes = {"vocab_size": 211, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=48, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes))
    generator = torch.Generator().manual_seed(n_embd)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.05, generator=generator)
    ours = GPT(GPTConfig(block_size=48, **sizes))
    ours.load_state_dict(from_hf(theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize(("n_embd", "n_head"), WIDTHS_AND_HEADS)
@pytest.mark.parametrize(("n_layer", "length"), [(1, 48), (2, 7)])
def test_logits_and_gradients_equal_those_of_transformers(n_embd: int, n_head: int, n_layer: int, length: int) -> None:
    ours, theirs = both(n_embd, n_head, n_layer)
    ids = torch.randint(211, (2, length + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    expected = theirs(inputs).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    assert expected.std() > 0.5  # else nearness would mean nothing
    torch.testing.assert_close(ours(inputs), expected, atol=1e-4, rtol=0)

    our_loss = ours(inputs, targets)
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=0)
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max()
        assert error <= 1e-4 * min(1.0, float(gradients[name].abs().max())), name


@pytest.mark.parametrize(
    ("name", "published"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameter_counts_are_the_published_ones_before_padding(name: str, published: int) -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(
            GPT2Config(**{key: getattr(SIZES[name], key) for key in ("n_layer", "n_head", "n_embd")})
        )
    assert sum(parameter.numel() for parameter in theirs.parameters()) == published
    if name == "gpt2":
        ours = GPT(replace(SIZES[name], vocab_size=50257))
        assert sum(parameter.numel() for parameter in ours.parameters()) == published
    config = SIZES[name]
    matrices = 12 * config.n_layer * config.n_embd**2 + (50257 + 1024) * config.n_embd
    vectors = config.n_layer * 13 * config.n_embd + 2 * config.n_embd
    assert matrices + vectors == published


@pytest.mark.parametrize("name", SIZES)
def test_shapes_are_those_of_transformers(name: str) -> None:
    config, before = SIZES[name], torch.get_rng_state()
    with torch.device("meta"):
        sizes = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        theirs = from_hf(dict(GPT2LMHeadModel(GPT2Config(**sizes)).named_parameters()))
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in GPT(config, device="meta").parameters())


def test_one_pass_serves_other_positions_masks_and_parts() -> None:
    """All in one, in parts with a cache, and beside a second text in one row, where its mask parts the two."""
    model = GPT(replace(SIZES["gpt2-nano"], block_size=12)).init_weights(0).eval()
    ids = torch.randint(50257, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model.features(ids)
    cache = [KeyValueCache(12) for _ in model.h]
    parts = [model.features(part, cache=cache) for part in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="13 tokens are more than the model's block_size 12"):
        model.features(ids[:, :1], cache=cache)
    text = torch.arange(24) // 12
    mask = (text == text[:, None]).tril()
    both = model.features(ids.view(1, 24), positions=torch.arange(12).repeat(2), mask=mask)
    torch.testing.assert_close(both.view(2, 12, -1), whole, atol=1e-5, rtol=1e-5)


def test_initial_weights_have_gpt2s_deviations() -> None:
    model = GPT(replace(SIZES["gpt2-mini"], vocab_size=4096)).init_weights(3)
    residual = 0.02 / math.sqrt(2 * 6)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            std = 0.01 if name == "wpe.weight" else residual if name.endswith("c_proj.weight") else 0.02
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.02), name
            assert abs(float(parameter.detach().mean())) < 0.02 * std, name


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = GPT(SIZES["gpt2-nano"]).init_weights(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = GPT(SIZES["gpt2-nano"]).init_weights(7), GPT(SIZES["gpt2-nano"]).init_weights(8)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert sum(not torch.equal(a, c) for a, _, c in pairs) == 2 + 4 * 2


def test_dropout_acts_in_training_only() -> None:
    model = GPT(replace(SIZES["gpt2-nano"], dropout=0.5)).init_weights(0)
    ids = torch.arange(20)[None]
    still = GPT(SIZES["gpt2-nano"]).init_weights(0)(ids)
    assert torch.equal(model.eval()(ids), still)
    assert (model.train()(ids) - still).abs().max() > 1e-3
    assert not torch.equal(model(ids), model(ids))


def test_bad_shapes_are_refused_with_the_numbers() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=4)).init_weights(0)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 16)
    with pytest.raises(ValueError, match="9 tokens are more than the model's block_size 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_embd 10 is not a multiple of n_head 3"):
        GPTConfig(n_embd=10, n_head=3)
    with pytest.raises(ValueError, match=r"unknown model 'gpt3'.*gpt2-xl"):
        model_config("gpt3")
