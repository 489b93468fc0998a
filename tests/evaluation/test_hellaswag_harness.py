"""The harness protocol against the lm-evaluation-harness itself, run offline on a task of its own over a local file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from hellaswag_examples import examples, opinionated_model, write_examples, write_model
from running import python, run

from gpt2_ddp.data.tokenizer import load_tokenizer, tokenizer_files
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.hellaswag import evaluate, read_examples, render
from gpt2_ddp.evaluation.multiple_choice import predictions, score
from gpt2_ddp.model.huggingface import load_model

TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function {utils}.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
"""The harness's own `hellaswag` task but for where the examples come from."""

SCRIPT = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

tasks, *models = sys.argv[1:]
for model in models:
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=8),
        tasks=["hellaswag_local"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        log_samples=True,
        bootstrap_iters=1,
    )
    samples = sorted(results["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    scores = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    hits = {key: [sample[key] for sample in samples] for key in ("acc", "acc_norm")}
    totals = {key: value for key, value in results["results"]["hellaswag_local"].items() if key.startswith("acc")}
    with open(f"{model}/answer.json", "w") as file:
        json.dump({"scores": scores, "totals": totals, **hits}, file)
"""
BLOCK_SIZES = (160, 32)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`val.jsonl`, and a model of each block size in a folder named for it, with what the harness found."""
    folder = tmp_path_factory.mktemp("harness")
    data = write_examples(folder / "val.jsonl", examples(40))
    models = [write_model(folder / str(block_size), opinionated_model(block_size)) for block_size in BLOCK_SIZES]
    ask_the_harness(folder, models, data)
    return folder


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_example_scores_as_in_the_harness(asked: Path, block_size: int) -> None:
    theirs = json.loads((asked / str(block_size) / "answer.json").read_text())
    model, context = load_model(asked / str(block_size)), DistContext()
    read = read_examples(asked / "val.jsonl")
    encoding = load_tokenizer()
    questions = [render(example, "harness", encoding) for example in read]
    scores = score(model, questions, context)
    for ours, others in zip(scores.tolist(), theirs["scores"], strict=True):
        assert ours == pytest.approx(others, abs=2e-3)
    chosen, chosen_norm = predictions(questions, scores)
    labels = [example.label for example in read]
    assert [float(a == b) for a, b in zip(chosen.tolist(), labels, strict=True)] == theirs["acc"]
    assert [float(a == b) for a, b in zip(chosen_norm.tolist(), labels, strict=True)] == theirs["acc_norm"]
    result = evaluate(model, read, protocol="harness", context=context)
    for key in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert getattr(result, key) == pytest.approx(theirs["totals"][f"{key},none"]), key
    assert theirs["acc"] != theirs["acc_norm"]
    longest = max(len(question.context) + max(map(len, question.endings)) for question in questions)
    assert (longest > block_size + 1) == (block_size == 32)  # what is too long is cut on the left


def ask_the_harness(folder: Path, models: Sequence[Path], data: Path) -> None:
    """Have the harness score the models, in a process of its own that may not use the network."""
    for model in models:
        for name, content in tokenizer_files().items():
            (model / name).write_bytes(content)
    tasks = folder / "tasks"
    tasks.mkdir()
    [place] = find_spec("lm_eval").submodule_search_locations
    shutil.copy(Path(place, "tasks", "hellaswag", "utils.py"), tasks / "local_hellaswag.py")
    (tasks / "hellaswag_local.yaml").write_text(TASK.format(data=json.dumps(str(data)), utils="local_hellaswag"))
    (folder / "script.py").write_text(SCRIPT)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    offline |= {"HF_HOME": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [*python(), str(folder / "script.py"), str(tasks), *map(str, models)]
    done = run(command, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
