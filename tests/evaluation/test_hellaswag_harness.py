"""The harness protocol against the lm-evaluation-harness itself, run offline on a task of its own over a local file."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

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

model, tasks, answer = sys.argv[1:]
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
with open(answer, "w") as file:
    json.dump({"scores": scores, "totals": totals, **hits}, file)
"""


@pytest.mark.parametrize("block_size", [160, 32])
def test_every_example_scores_as_in_the_harness(tmp_path: Path, block_size: int) -> None:
    data = write_examples(tmp_path / "val.jsonl", examples(40))
    folder = write_model(tmp_path / "model", opinionated_model(block_size))
    theirs = ask_the_harness(tmp_path, folder, data)

    model, context = load_model(folder), DistContext()
    read = read_examples(data)
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


def ask_the_harness(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """What the harness finds, in a process of its own that may not use the network."""
    for name, content in tokenizer_files().items():
        (model / name).write_bytes(content)
    tasks = folder / "tasks"
    tasks.mkdir()
    import lm_eval.tasks.hellaswag.utils as preprocessing

    (tasks / "local_hellaswag.py").write_text(inspect.getsource(preprocessing))
    (tasks / "hellaswag_local.yaml").write_text(TASK.format(data=json.dumps(str(data)), utils="local_hellaswag"))
    (folder / "script.py").write_text(SCRIPT)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    offline |= {"HF_HOME": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [*python(), str(folder / "script.py"), str(model), str(tasks), str(folder / "answer.json")]
    done = run(command, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "answer.json").read_text()))
