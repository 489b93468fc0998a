"""GPT-2 directories: transformers opens ours, we open transformers', and nothing else gets in."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hellaswag_examples import write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_ddp.data.tokenizer import load_tokenizer, tokenizer_files
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.huggingface import config_from_hf, find_model, from_hf, hf_config, load_model, to_hf

TINY = GPTConfig(block_size=24, vocab_size=97, n_layer=2, n_head=2, n_embd=16)
FUZZ = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randomized(config: GPTConfig, seed: int = 0) -> GPT:
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return model


def same_weights(one: GPT, other: GPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_transformers_opens_what_we_write_and_answers_alike(tmp_path: Path) -> None:
    model = randomized(replace(SIZES["gpt2-nano"], block_size=40))
    folder = write_model(tmp_path / "model", model)
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is GPT2LMHeadModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    text = "The fox didn't jump over 13 lazy dogs."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == load_tokenizer().encode_ordinary(text)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-5)
    assert same_weights(load_model(folder), model)


@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_we_open_what_transformers_writes(tmp_path: Path, shard_size: str) -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_layer=2, n_head=2, n_embd=16)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    ours = load_model(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_the_published_layout_has_no_prefix_and_carries_masks(tmp_path: Path) -> None:
    model = randomized(TINY)
    folder = write_model(tmp_path / "model", model)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(2)}
    masks |= {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors | masks, folder / "model.safetensors")
    assert same_weights(load_model(folder), model)


def test_names_and_bits_survive_the_way_there_and_back() -> None:
    tensors = {name: tensor.detach() for name, tensor in randomized(TINY).named_parameters()}
    tensors["h.0.attn.c_attn.weight"][0, 0] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)  # a NaN
    theirs = to_hf(tensors)
    assert theirs["transformer.h.1.mlp.c_fc.weight"].shape == (16, 64)
    own = {tensor.data_ptr() for tensor in tensors.values()}
    assert {tensor.data_ptr() for tensor in theirs.values()} == own  # nothing is copied on the way
    back = from_hf(theirs)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name


def test_padding_rows_are_the_mean_and_change_no_probability(tmp_path: Path) -> None:
    model = randomized(TINY)
    folder = write_model(tmp_path / "model", model)
    padded = load_model(folder, vocab_size=128, dropout=0.25)
    assert padded.config == replace(TINY, vocab_size=128, dropout=0.25)
    rows = padded.wte.weight
    assert torch.equal(rows[:97], model.wte.weight)
    torch.testing.assert_close(rows[97:], model.wte.weight.mean(0).expand(31, -1))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits, expected = padded.eval()(ids), model(ids)
    torch.testing.assert_close(logits[..., :97], expected, atol=1e-6, rtol=0)
    assert (logits[..., 97:].amax(-1) <= expected.amax(-1)).all()
    with pytest.raises(ValueError, match="has 97 token embeddings, more than 64"):
        load_model(folder, vocab_size=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_formats_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = randomized(TINY).to(dtype)
    loaded = load_model(write_model(tmp_path / "model", model))
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert same_weights(loaded, model.float())


def break_model(folder: Path, fault: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if fault == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
        return
    if fault in ("outside", "not_there"):
        name = "../model.safetensors" if fault == "outside" else "model-1.safetensors"
        weights.rename(folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        return
    changes = {
        "missing": lambda: tensors.pop("transformer.h.1.ln_2.bias"),
        "extra": lambda: tensors.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}),
        "misshapen": lambda: tensors.update({"transformer.wpe.weight": torch.zeros(23, 16)}),
        "transposed": lambda: tensors.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}),
        "integers": lambda: tensors.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int32)}),
    }
    changes[fault]()
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pickle", r"only as pytorch_model\.bin, a pickle"),
        ("truncated", "not a whole safetensors file"),
        ("outside", r"lists '\.\./model\.safetensors'"),
        ("not_there", r"lists 'model-1\.safetensors'"),
        ("missing", r"lacks 1 tensors, 'h\.1\.ln_2\.bias'"),
        ("extra", r"'transformer\.h\.2\.ln_1\.bias' is no part of a GPT-2 with 2 layers"),
        ("misshapen", r"'transformer\.wpe\.weight' has shape \(23, 16\).*\(24, 16\)"),
        ("transposed", r"'transformer\.h\.0\.mlp\.c_fc\.weight' has shape \(64, 16\).*\(16, 64\)"),
        ("integers", r"'transformer\.ln_f\.bias' holds I32"),
    ],
)
def test_broken_weights_are_refused_by_name(tmp_path: Path, fault: str, message: str) -> None:
    folder = write_model(tmp_path / "model", randomized(TINY))
    break_model(folder, fault)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not 'gpt2'"),
        ({"n_layer": None}, "n_layer is None"),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ({"n_embd": 10**12}, "n_embd is 1000000000000"),
        ({"n_layer": True}, "n_layer is True"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"n_inner": 48}, "n_inner 48"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_is_no_gpt2_of_ours_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_model(tmp_path / "model", randomized(TINY))
    (folder / "config.json").write_text(json.dumps(hf_config(TINY) | change))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_model(folder)


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("gpt2")])
def test_every_size_survives_its_config(name: str) -> None:
    assert config_from_hf(json.loads(json.dumps(hf_config(SIZES[name])))) == SIZES[name]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(key=st.sampled_from(sorted(hf_config(TINY))), value=JSON_VALUES)
def test_any_value_in_a_config_loads_or_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = write_model(tmp_path_factory.mktemp("fuzz") / "model", randomized(TINY))
    (folder / "config.json").write_text(json.dumps(hf_config(TINY) | {key: value}))
    loads_or_refuses(folder)


@FUZZ
@given(content=st.binary(max_size=64) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_file_as_config_is_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = write_model(tmp_path_factory.mktemp("fuzz") / "model", randomized(TINY))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)


def test_a_deep_and_a_long_config_are_refused_at_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", randomized(TINY))
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not JSON"):
        load_model(folder)
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte of nothing
    with pytest.raises(ValueError, match="1099511627776 bytes"):
        load_model(folder)


HEADER_FAULTS = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 3000), st.just(b"")),
    st.tuples(st.just("overwrite"), st.integers(0, 2600), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("length"), st.just(0), st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little"))),
)


@FUZZ
@given(fault=HEADER_FAULTS)
def test_any_damage_to_a_safetensors_header_loads_or_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, fault: tuple[str, int, bytes]
) -> None:
    folder = write_model(tmp_path_factory.mktemp("fuzz") / "model", randomized(TINY))
    weights = folder / "model.safetensors"
    kind, at, new = fault
    content = weights.read_bytes()
    weights.write_bytes(content[:at] if kind == "cut" else content[:at] + new + content[at + len(new) :])
    loads_or_refuses(folder)


@pytest.mark.parametrize("shape", [[2**40, 16], [2**63, 2**63], [-1, 16], [97, 16, 1], []])
def test_absurd_shapes_in_a_header_are_refused(tmp_path: Path, shape: list[int]) -> None:
    folder = write_model(tmp_path / "model", randomized(TINY))
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(folder)


def loads_or_refuses(folder: Path) -> None:
    start = time.perf_counter()
    said = str(folder)
    try:
        assert load_model(folder).config.n_embd == 16
    except ValueError as error:
        said = str(error)
    assert str(folder) in said
    assert time.perf_counter() - start < 2


def test_a_run_is_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 100_000_000, 20):
        write_model(run / "checkpoints" / f"step_{step:08d}", randomized(TINY))
    (run / "config.json").write_text("{}")  # the run's own, not a model's
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_model(str(run))
    for step in (5, 20):
        (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    aside = write_model(run / "checkpoints" / "step_00000030.broken", randomized(TINY))
    (aside / "manifest.json").write_text("{}")
    assert find_model(str(run)) == run / "checkpoints" / "step_00000020"
    (run / "checkpoints" / "step_100000000" / "manifest.json").write_text("{}")
    assert find_model(str(run)).name == "step_100000000"
    assert find_model(str(aside)) == aside


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no model 'gpt-5'.*gpt2-xl"):
        find_model("gpt-5")
    with pytest.raises(ValueError, match="neither a run nor a model"):
        find_model(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "gpt2", randomized(TINY))
    assert find_model("gpt2") == Path("gpt2")
