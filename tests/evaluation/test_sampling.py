"""`generate` draws from the distribution that its settings define, and touches nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, TopPLogitsWarper

from gpt2_ddp.data.own_tokenizer import own_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation import inference
from gpt2_ddp.evaluation.inference import attention_backends
from gpt2_ddp.evaluation.multiple_choice import Question, score
from gpt2_ddp.evaluation.sampling import PROMPT, Continuation, Drawing, Sample, generate, nucleus
from gpt2_ddp.evaluation.validation import validation_loss
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.huggingface import hf_config, to_hf
from gpt2_ddp.model.vocabulary import EOT

SMALL = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)


def sharp(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose next tokens are far from equally likely."""
    model = GPT(config).init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12 if name == "wte.weight" else 25)
    return model


def test_temperature_0_is_the_greedy_decoding_of_transformers() -> None:
    model = sharp(SMALL)
    theirs = GPT2LMHeadModel(GPT2LMHeadModel.config_class(**hf_config(SMALL)))
    theirs.load_state_dict(to_hf(model.state_dict()), strict=False)
    theirs.tie_weights()
    prompt = torch.tensor([[1, 2, 3], [7, 7, 9]])
    expected = theirs.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
    )
    for temperature in (0, 1e-46):  # which is 0 as float32
        assert torch.equal(generate(model, prompt, max_new_tokens=12, temperature=temperature), expected)
    assert len(set(expected[0].tolist())) > 4  # a loop on one token would show little


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.5, 5), (1.0, 1), (1.0, 1000)])
def test_draws_follow_the_softmax_of_the_likeliest(temperature: float, top_k: int | None) -> None:
    model, prompt, draws = sharp(SMALL), [3, 1, 4, 1, 5], 20_000
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1].double() / temperature
    kept = logits.sort(descending=True).indices[: top_k or 40]
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = logits[kept].exp() / logits[kept].exp().sum()

    assert 0.05 < expected.max() < (0.9 if top_k != 1 else 1.1)
    rows = generate(model, [prompt] * draws, max_new_tokens=1, temperature=temperature, top_k=top_k, seed=5)
    found = torch.bincount(rows[:, -1], minlength=40).double() / draws
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all()


def in_nucleus(likelihood: list[float], top_p: float) -> set[int]:
    """The likeliest ids one by one, until they have `top_p` together."""
    kept: set[int] = set()
    for token in sorted(range(len(likelihood)), key=lambda token: -likelihood[token]):
        if math.fsum(likelihood[other] for other in kept) >= top_p:
            break
        kept.add(token)
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_the_nucleus_is_that_of_its_definition_and_of_transformers(top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 8.0):
        logits = (torch.randn(6, 500, generator=generator) * scale).sort(descending=True)[0]
        kept = nucleus(logits, top_p) > float("-inf")
        for row, found in zip(logits.double().softmax(-1).tolist(), kept, strict=True):
            assert set(found.nonzero().flatten().tolist()) == in_nucleus(row, top_p)
        theirs = TopPLogitsWarper(top_p)(torch.empty(6, 0), logits.double())
        assert torch.equal(kept, theirs > float("-inf"))
        assert torch.equal(nucleus(logits, top_p)[kept], logits[kept])


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.6), (12, 0.6), (3, 0.99), (None, 1e-6)])
def test_draws_follow_the_softmax_of_the_nucleus_of_the_likeliest(top_k: int | None, top_p: float) -> None:
    logits, draws = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2, 20_000
    ranked = (logits.double() / 1.3).sort(descending=True).indices[: top_k or 40]
    likelihood = torch.zeros(40, dtype=torch.float64)
    likelihood[ranked] = (logits.double()[ranked] / 1.3).softmax(-1)
    kept = sorted(in_nucleus(likelihood.tolist(), top_p))
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = likelihood[kept] / likelihood[kept].sum()
    drawing = Drawing(temperature=1.3, top_k=top_k, top_p=top_p)
    drawn = drawing.draw(logits.expand(draws, -1), torch.Generator().manual_seed(5))
    found = torch.bincount(drawn, minlength=40).double() / draws
    assert found[expected == 0].sum() == 0
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all()


@pytest.mark.parametrize("top_k", [None, 7, 1000])
def test_a_top_p_of_1_draws_what_was_drawn_without_it(top_k: int | None) -> None:
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(2))
    scaled = (logits - logits.amax(-1, keepdim=True)) / 0.8
    values, ids = scaled.topk(top_k) if top_k == 7 else (scaled, torch.arange(40).expand(300, -1))
    expected = ids.gather(1, torch.multinomial(values.softmax(-1), 1, generator=torch.Generator().manual_seed(9)))
    drawing = Drawing(temperature=0.8, top_k=top_k, top_p=1.0)
    assert torch.equal(drawing.draw(logits, torch.Generator().manual_seed(9)), expected.squeeze(1))


def test_padding_ids_are_never_drawn_however_likely() -> None:
    model = GPT(SIZES["gpt2-nano"]).init_weights(0)
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[50257:] = 1.0  # each of them has the largest logit by far
        assert (model(torch.tensor([[5]]))[0, -1].argmax() >= 50257).all()
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 20}):
        rows = generate(model, [[5]] * 50, max_new_tokens=4, **settings)
        assert int(rows.max()) < 50257


def test_the_same_seed_draws_the_same_and_rows_differ() -> None:
    model = sharp(SMALL)
    rows = generate(model, [[1]] * 3, max_new_tokens=30, seed=11)
    assert torch.equal(rows, generate(model, [[1]] * 3, max_new_tokens=30, seed=11))
    assert not torch.equal(rows, generate(model, [[1]] * 3, max_new_tokens=30, seed=12))
    assert len(set(map(tuple, rows.tolist()))) == 3


def test_a_tokenizer_that_makes_no_token_of_the_prompt_begins_with_its_end(tmp_path: Path) -> None:
    letters = Tokenizer(BPE({"\u0414": 0, "</s>": 1}, []))
    letters.save(str(tmp_path / "tokenizer.json"))
    tokenizer = own_tokenizer(tmp_path)
    assert tokenizer.encode_ordinary(PROMPT) == []
    model = GPT(GPTConfig(block_size=8, vocab_size=128, n_layer=1, n_head=1, n_embd=8)).init_weights(0)
    sample = Sample(every=1, seed=0, sequence_length=8, tokenizer=tokenizer)
    found = sample.run(model, DistContext(), nullcontext(), step=1)
    assert found is not None
    assert found.values["text"].startswith("</s>")


def test_training_is_left_as_it_was() -> None:
    model = sharp(replace(SMALL, dropout=0.5)).train()
    still = generate(sharp(SMALL).eval(), [1, 2], max_new_tokens=8)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert torch.equal(generate(model, [1, 2], max_new_tokens=8), still)  # no dropout
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    generate(model.eval(), [1, 2], max_new_tokens=1)
    assert not model.training
    with pytest.raises(IndexError):
        generate(model.train(), [39, 41], max_new_tokens=1)  # a token that this model does not have
    assert model.training


def reread(model: GPT, prompt: torch.Tensor, *, new: int, seed: int, length: int) -> torch.Tensor:
    """What `generate` is to give, all that counts being read anew for each token."""
    generator, ids = torch.Generator().manual_seed(seed), prompt
    for _ in range(new):
        with torch.no_grad():
            logits = model(ids[:, -length:])[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return ids


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("start", "new", "length"), [(1, 15, 16), (5, 8, 16), (15, 1, 16), (3, 30, 16), (20, 5, 9)])
def test_the_text_is_that_of_a_model_that_reads_all_anew(rows: int, start: int, new: int, length: int) -> None:
    """Also where the window slides, which is where `start + new` is past `length`."""
    model = sharp(SMALL)
    prompt = torch.randint(40, (rows, start), generator=torch.Generator().manual_seed(start))
    found = generate(model, prompt, max_new_tokens=new, seed=3, sequence_length=length)
    assert torch.equal(found, reread(model, prompt, new=new, seed=3, length=length))


def test_each_token_is_read_once_until_the_window_slides() -> None:
    model, read = sharp(SMALL), list[int]()
    model.wte.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, [1, 2, 3], max_new_tokens=16)
    assert read == [3, *[1] * 13, 16, 16]


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("length", [16, 40])
def test_a_text_is_written_on_as_if_all_of_it_had_been_the_prompt(interrupted: bool, length: int) -> None:
    """Also past the length, where the window slides, and after Ctrl-C in the middle of a pass through the layers."""
    model, drawing = sharp(replace(SMALL, block_size=40)), Drawing(temperature=0)
    text = Continuation(model, [1, 2, 3], drawing, sequence_length=length)
    text.write(4)
    if interrupted:
        with interrupted_in(model.h[1]), pytest.raises(KeyboardInterrupt):
            text.write(1)
    text.append([9, 8])
    text.write(9)
    expected = generate(model, [1, 2, 3], max_new_tokens=4, temperature=0, sequence_length=length)[0].tolist()
    expected = generate(model, [*expected, 9, 8], max_new_tokens=9, temperature=0, sequence_length=length)
    assert torch.equal(text.ids, expected)


@contextmanager
def interrupted_in(module: torch.nn.Module) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()


def test_only_the_last_block_size_tokens_count() -> None:
    model = sharp(SMALL)
    prompt = torch.randint(40, (1, 30), generator=torch.Generator().manual_seed(0))
    long, short = generate(model, prompt, max_new_tokens=5), generate(model, prompt[:, -16:], max_new_tokens=5)
    assert torch.equal(long[:, 30:], short[:, 16:])
    assert torch.equal(long[:, :30], prompt)


def test_rows_that_end_stay_ended_and_all_ended_stops() -> None:
    model = GPT(replace(SIZES["gpt2-nano"], block_size=64)).init_weights(0)
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[EOT] = 9.0 / 64  # a logit of 9 against 50,256 of about 0: a seventh of the draws
    rows = generate(model, [[5]] * 8, max_new_tokens=100, seed=3, stop_at_eot=True)
    assert 3 < rows.shape[1] < 100
    ends = [row.index(EOT) for row in rows.tolist()]
    assert len(set(ends)) > 1
    assert max(ends) == rows.shape[1] - 1
    assert all(set(row[end:]) == {EOT} for row, end in zip(rows.tolist(), ends, strict=True))
    free = generate(model, [[5]] * 8, max_new_tokens=20, seed=3)
    assert free.shape[1] == 21
    for row, other, end in zip(rows.tolist(), free.tolist(), ends, strict=True):
        assert row[: min(end, 20) + 1] == other[: min(end, 20) + 1]


def test_outside_of_training_cudnn_computes_no_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided for a GPU, in force here: PyTorch has the switches also where it has no GPU."""
    on_gpu = attention_backends(torch.device("cuda", 0))
    assert on_gpu is not None
    assert {backend.name for backend in on_gpu} == {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"}
    assert attention_backends(torch.device("cpu")) is attention_backends(torch.device("mps")) is None
    monkeypatch.setattr(inference, "attention_backends", lambda _: on_gpu)
    attention, enabled = F.scaled_dot_product_attention, []

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, ids = sharp(SMALL), torch.arange(8).view(2, 4)
    question = Question(context=[1, 2], endings=[[3], [4], [5], [6, 7]], lengths=[1, 1, 1, 2], label=0)
    for run in (
        lambda: generate(model, [1, 2], max_new_tokens=2),
        lambda: validation_loss(model, [(ids, ids)], DistContext(), nullcontext()),
        lambda: score(model, [question], DistContext()),
        lambda: model(ids, ids),
    ):
        before = len(enabled)
        run()
        assert len(enabled) > before
    assert enabled == [False] * (len(enabled) - 2) + [True, True]  # training's, in two blocks, is left as it was


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one token"),
        ([50257], {}, "0 to 50256"),
        ([-1], {}, "0 to 50256"),
        ([1], {"temperature": -0.1}, "temperature -0.1"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"top_k": 0}, "top-k 0"),
        ([1], {"top_p": 0.0}, "top-p 0.0"),
        ([1], {"top_p": 1.5}, "top-p 1.5"),
        ([1], {"top_p": float("nan")}, "top-p nan"),
        ([1], {"max_new_tokens": -1}, "-1 new tokens"),
    ],
)
def test_bad_settings_are_refused(prompt: list[int], settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(sharp(SMALL), prompt, **{"max_new_tokens": 1, **settings})
