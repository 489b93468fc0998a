"""`python -m eval convert`: weights of nanoGPT, build-nanogpt and llm.c come in whole, and go out to who insists."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import foreign_models as foreign
import numpy as np
import pytest
import torch
from foreign_models import Shape
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import convert as convert_module
from eval.__main__ import main
from eval.convert import Convert
from gpt2_ddp.data.tokenizer import load_tokenizer, tokenizer_of_model
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import find_model, load_model
from gpt2_ddp.system.errors import UserError, user_error

IDS = [50256, 464, 21831, 13, 0, 1, 9, 50256]
PADDED = Shape(vocab=50304)


@pytest.fixture(autouse=True, scope="module")
def tokenizer_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "tokenizer_files", functools.cache(convert_module.tokenizer_files))
        yield


def convert(source: Path, target: Path, to: str = "hf") -> Path:
    Convert(source=str(source), target=target, to=to).run()  # type: ignore[arg-type]
    return target


def assert_computes(model: GPT, arrays: foreign.Arrays, ids: list[int] = IDS, heads: int = 2) -> None:
    expected = foreign.logits(arrays, ids, heads)
    with torch.no_grad():
        found = model(torch.tensor([ids]))[0].double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "prefix", "biases"),
    [(PADDED, "transformer.", True), (Shape(), "_orig_mod.transformer.", False)],
    ids=["padded", "compiled-without-biases"],
)
def test_a_checkpoint_of_nanogpt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: Shape, prefix: str, biases: bool
) -> None:
    arrays = foreign.weights(shape, biases=biases)
    model = foreign.state_dict(arrays, prefix)
    model |= {f"{prefix}h.{layer}.attn.bias": torch.ones(1, 1, 12, 12).tril() for layer in range(2)}  # without flash
    torch.save(foreign.nanogpt(shape, model), tmp_path / "whatever.bin")
    folder = convert(tmp_path / "whatever.bin", tmp_path / "new" / "model")
    assert_computes(load_model(folder), arrays)
    said = capsys.readouterr()
    assert said.out.endswith(f"12 positions, {shape.vocab} token embeddings\n")
    assert said.err.startswith("warning: nanoGPT's present code computes GELU exactly")
    assert ("no biases" in said.err) != biases

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))  # as the warning says
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = foreign.logits(arrays, IDS, 2, foreign.exact_gelu)
    np.testing.assert_allclose(theirs(torch.tensor([IDS])).logits[0].detach(), expected, atol=1e-5)
    assert np.abs(expected - foreign.logits(arrays, IDS, 2)).max() > 2e-5  # one of them was computed


def test_a_checkpoint_of_build_nanogpt_opens_in_transformers_without_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = foreign.weights(PADDED)
    foreign.save_build_nanogpt(tmp_path / "model.pt", PADDED, foreign.state_dict(arrays))
    with pytest.raises(Exception, match="GPTConfig"):
        torch.load(tmp_path / "model.pt", weights_only=True)
    folder = convert(tmp_path / "model.pt", tmp_path / "model")
    assert capsys.readouterr().err == ""
    assert_computes(load_model(folder), arrays)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The fox didn't jump."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == load_tokenizer().encode_ordinary(text)
    assert tokenizer.model_max_length == 12
    expected = foreign.logits(arrays, ids[0].tolist(), 2)
    np.testing.assert_allclose(theirs(ids).logits[0].detach(), expected, atol=1e-5)
    written = theirs.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert int(written) == expected[-1].argmax()


@pytest.mark.parametrize("rows", [65, 50_400])
def test_a_vocabulary_of_its_own_gets_no_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    """Nor GPT-2's, of those who read it."""
    shape = Shape(vocab=rows)
    arrays = foreign.weights(shape)
    torch.save(foreign.nanogpt(shape, foreign.state_dict(arrays)), tmp_path / "ckpt.pt")
    folder = convert(tmp_path / "ckpt.pt", tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None
    with pytest.raises(ValueError, match=f"has {rows} token embeddings, GPT-2's tokenizer has 50257 ids, and no"):
        tokenizer_of_model(folder)
    assert f"{rows} token embeddings are not of GPT-2's vocabulary" in capsys.readouterr().err
    assert_computes(load_model(folder), arrays, ids=[3, 64, 0])
    with pytest.raises(ValueError, match=f"has {rows} token embeddings: 50257 are GPT-2's, up to 50304"):
        convert(folder, tmp_path / "other", "hf-50257")
    convert(folder, tmp_path / "model.bin", "llm.c")
    assert (tmp_path / "model.bin").read_bytes() == foreign.llm_c(shape, arrays)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_model_of_llm_c_there_and_back(tmp_path: Path, bfloat16: bool) -> None:
    shape = Shape(layers=3, heads=4)
    arrays = foreign.weights(shape)
    stored = foreign.llm_c(shape, arrays, bfloat16=bfloat16)
    (tmp_path / "in.bin").write_bytes(stored)
    folder = convert(tmp_path / "in.bin", tmp_path / "model")
    if bfloat16:
        halves = {name: foreign.nearest_bfloat16(array) for name, array in arrays.items()}
        arrays = {name: (half.astype("<u4") << 16).view("<f4") for name, half in halves.items()}
    model = load_model(folder)
    assert model.config.vocab_size == 50257  # its rows of zeros would take all the probability
    assert_computes(model, arrays, heads=4)
    to = "llm.c-bf16" if bfloat16 else "llm.c"
    assert convert(folder, tmp_path / "out.bin", to).read_bytes() == stored
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "model", "out.bin"]


def test_float32_is_rounded_for_llm_c_as_llm_c_does(tmp_path: Path) -> None:
    """A padded model leaves its padding here, and keeps it nowhere else where it was not asked for."""
    arrays = foreign.weights(PADDED)
    foreign.save_build_nanogpt(tmp_path / "model.pt", PADDED, foreign.state_dict(arrays))
    convert(tmp_path / "model.pt", tmp_path / "model.bin", "llm.c-bf16")
    arrays["wte.weight"] = arrays["wte.weight"][:50257]
    assert (tmp_path / "model.bin").read_bytes() == foreign.llm_c(Shape(), arrays, bfloat16=True)


def test_fifty_thousand_two_hundred_and_fifty_seven_rows_for_tools_that_insist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = foreign.weights(PADDED)
    foreign.save_build_nanogpt(tmp_path / "model.pt", PADDED, foreign.state_dict(arrays))
    padded = convert(tmp_path / "model.pt", tmp_path / "padded")
    (padded / "vocab.json").write_text('{"own": 0}')
    folder = convert(padded, tmp_path / "model", "hf-50257")
    assert "50257 token embeddings of 50304\n" in capsys.readouterr().out
    assert (folder / "vocab.json").read_text() == '{"own": 0}'  # the tokenizer that the directory brought
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert theirs.get_input_embeddings().weight.shape == (50257, 8)
    whole = load_file(padded / "model.safetensors")
    cut = load_file(folder / "model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor[:50257]), name
    again = load_model(folder, vocab_size=50304)
    assert torch.equal(again.wte.weight[:50257], whole["transformer.wte.weight"][:50257])


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 50299}}, "added_tokens": [{"id": 50256}]}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 50299, "content": "[PAD]"}]}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.5]] * 50300}}},
        {"vocab.json": {"a": 0, "b": 50256}, "added_tokens.json": {"[PAD]": 50299}},
    ],
)
def test_no_token_of_a_tokenizer_is_taken_for_padding(tmp_path: Path, files: dict[str, object]) -> None:
    arrays = foreign.weights(PADDED)
    foreign.save_build_nanogpt(tmp_path / "model.pt", PADDED, foreign.state_dict(arrays))
    folder = convert(tmp_path / "model.pt", tmp_path / "model")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / file).unlink()
    for name, contents in files.items():
        (folder / name).write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="has 50304 token embeddings, 50300 of them for its tokenizer's ids: 50257"):
        convert(folder, tmp_path / "cut", "hf-50257")
    convert(folder, tmp_path / "model.bin", "llm.c")
    arrays["wte.weight"] = arrays["wte.weight"][:50300]
    assert (tmp_path / "model.bin").read_bytes() == foreign.llm_c(Shape(vocab=50300), arrays)


@pytest.mark.parametrize("to", ["hf", "llm.c"])
def test_what_is_there_is_not_written_over(tmp_path: Path, to: str) -> None:
    shape = Shape(vocab=65)
    (tmp_path / "in.bin").write_bytes(foreign.llm_c(shape, foreign.weights(shape)))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "other.tmp").write_text("mine")
    for name in ("file", "folder", "in.bin", "other"):
        with pytest.raises(ValueError, match="is there already: name another target"):
            convert(tmp_path / "in.bin", tmp_path / name, to)
    mine = [tmp_path / "file", tmp_path / "folder" / "file", tmp_path / "other.tmp"]
    assert [path.read_text() for path in mine] == ["mine"] * 3
    (tmp_path / "empty").mkdir()
    if to == "hf":
        assert load_model(convert(tmp_path / "in.bin", tmp_path / "empty", to)).config.vocab_size == 65


def test_the_command_tells_what_is_wrong_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no model")
    for source, said in {
        "text": "text begins with b'no m': it is no checkpoint of nanoGPT",
        "nowhere": "no model '",
        ".": "is neither a run nor a model",
    }.items():
        monkeypatch.setattr("sys.argv", ["eval", "convert", str(tmp_path / source), str(tmp_path / "out")])
        with pytest.raises(UserError, match=said) as raised:
            main()
        assert len((user_error(raised.value) or "").splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_where_a_model_folder_is_asked_for_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"ckpt\.pt is a file: make a model folder of it by python -m eval convert"):
        find_model(str(tmp_path / "ckpt.pt"))
