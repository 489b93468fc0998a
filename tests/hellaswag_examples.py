"""Examples in the form of the HellaSwag data set, written for the tests, and a model that has opinions on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import hf_config, to_hf

PEOPLE = ("A man", "the girl in red", "Two women", "someone", "An old fisherman", "The crowd", "a café owner")
DEEDS = (
    "pours water into a bowl",
    "stands up and waves",
    "peels three potatoes",
    "rides off on a horse",
    "looks at the camera, then turns around",
    "puts glue on the paper",
    "runs",
    "tries to lift the weight but can't do it",
)
PLACES = ("in a kitchen", "by the river", "on a stage with 2 lights", "in the snow", "at  the fair")
LABELS = ("Cooking", "Rock climbing", "Home and Garden", "Playing accordion", "Finance and Business")
WIKIHOW = (
    "[header] How to {deed} [title] Get ready. [step] Find a quiet spot {place}.",
    "[header] How to wash up [title] Fill the sink. [step] Use warm water. [substeps] Not hot. [title] Dry {place}.",
)


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of a data set: half short scenes, half WikiHow texts with their marks; some odd ones first."""
    rng = random.Random(seed)
    lines = [_odd(rng, ctx_a) for ctx_a in ("One [title]", "[header]", "x  y  z [step]", "“Quoted” naïve text: 5 €")]
    while len(lines) < count:
        deed, place = rng.choice(DEEDS), rng.choice(PLACES)
        if rng.random() < 0.5:
            ctx_a, ctx_b = f"{rng.choice(PEOPLE)} {deed} {place}.", rng.choice(PEOPLE)
            endings = [deed + rng.choice((".", " again.", f" {place}.")) for deed in rng.sample(DEEDS, 4)]
        else:
            ctx_a, ctx_b = rng.choice(WIKIHOW).format(deed=deed, place=place), ""
            endings = [f"{who} {rng.choice(DEEDS)}. [substeps] Then wait. " * 2 for who in rng.sample(PEOPLE, 4)]
            endings = [ending[: rng.randint(20, 80)] for ending in endings]
        lines.append(_line(rng, ctx_a, ctx_b, endings))
    return lines[:count]


def _odd(rng: random.Random, ctx_a: str) -> dict[str, Any]:
    return _line(rng, ctx_a, "", ["[step] Stop. [title] Go  on", "a", "don't [unclosed", "[substeps] Über [title] Ja"])


def _line(rng: random.Random, ctx_a: str, ctx_b: str, endings: list[str]) -> dict[str, Any]:
    return {
        "ind": rng.randrange(10_000),
        "activity_label": rng.choice(LABELS),
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}".strip(),
        "split": "val",
        "endings": endings,
        "label": rng.randrange(4),
    }


def write_examples(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def opinionated_model(block_size: int, seed: int = 0) -> GPT:
    """Random weights, large enough that endings differ by many nats."""
    model = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32)).init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12 if name == "wte.weight" else 20)
    return model


def write_model(folder: Path, model: GPT) -> Path:
    """`model` as a Hugging Face directory, without a tokenizer."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in to_hf(model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    return folder
