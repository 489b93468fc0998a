"""Weights that went through other programs: transformers and back into a run, and what is published beside GPT-2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drivers import warm
from running import checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gpt2_ddp.model.gpt import SIZES
from gpt2_ddp.model.huggingface import config_from_hf, load_model
from gpt2_ddp.system.errors import UserError

DISTILLED = {
    "_num_labels": 1,
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02,
    "label2id": {"LABEL_0": 0},
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
"""The fields of distilgpt2's config.json."""


def write_distilled(folder: Path) -> None:
    """A small model of its form, in half precision and two files: masks as bytes, the head stored a second time."""
    small = {"vocab_size": 97, "n_positions": 24, "n_ctx": 24, "n_embd": 24}
    (folder / "config.json").write_text(json.dumps(DISTILLED | small))
    generator = torch.Generator().manual_seed(0)
    c = 24
    shapes = {"wte.weight": (97, c), "wpe.weight": (24, c), "ln_f.weight": (c,), "ln_f.bias": (c,)}
    for layer in range(6):
        for name, size in {"attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c)}.items():
            shapes |= {f"h.{layer}.{name}.weight": size, f"h.{layer}.{name}.bias": size[1:]}
        for name, size in {"mlp.c_fc": (c, 4 * c), "mlp.c_proj": (4 * c, c)}.items():
            shapes |= {f"h.{layer}.{name}.weight": size, f"h.{layer}.{name}.bias": size[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (c,), f"h.{layer}.{name}.bias": (c,)}
    tensors = {
        f"transformer.{name}": (torch.randn(size, generator=generator) * 0.3).half() for name, size in shapes.items()
    }
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for layer in range(6):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    parts = {f"model-0000{part}-of-00002.safetensors": sorted(tensors)[part - 1 :: 2] for part in (1, 2)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_the_six_layers_of_distilgpt2(tmp_path: Path) -> None:
    assert replace(config_from_hf(DISTILLED), vocab_size=50304) == SIZES["distilgpt2"]
    write_distilled(tmp_path)
    model = load_model(tmp_path)
    assert model.config.n_layer == 6
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="25 tokens are more than the model's block_size 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))


def test_a_run_begins_with_what_transformers_made_of_a_checkpoint(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Its embeddings cut as `resize_token_embeddings` does, in half precision and several files."""
    source = checkpoint(warm.clean_run(shared_folder, data_dir))
    theirs = AutoModelForCausalLM.from_pretrained(source).bfloat16()
    theirs.resize_token_embeddings(500)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    shutil.copy(source / "vocab.json", tmp_path / "model")  # else nobody knows whose tokens they are

    warm.train(tmp_path / "run", data_dir, f"--init-from={tmp_path / 'model'}", "--max-lr=0", "--max-steps=1")
    before, after = (load_file(path / "model.safetensors") for path in (source, checkpoint(tmp_path / "run")))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][:500], tensor[:500].bfloat16().float()), name
    rows = after["transformer.wte.weight"]
    assert len(rows) == 512
    torch.testing.assert_close(rows[500:], rows[:500].mean(0).expand(12, -1))

    (tmp_path / "short").mkdir()
    theirs.config.n_positions = 48
    theirs.transformer.wpe.weight.data = theirs.transformer.wpe.weight.data[:48]
    theirs.save_pretrained(tmp_path / "short")
    shutil.copy(source / "vocab.json", tmp_path / "short")
    done = warm.train(tmp_path / "other", data_dir, f"--init-from={tmp_path / 'short'}", status=2)
    assert "is no gpt2-tiny: it has GPTConfig(block_size=48" in done.stderr
