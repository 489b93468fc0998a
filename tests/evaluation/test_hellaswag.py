"""Both HellaSwag protocols against scorings written from their definitions, and files that are none."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from hellaswag_examples import examples, opinionated_model, write_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.hellaswag import Example, evaluate, read_examples, render
from gpt2_ddp.evaluation.multiple_choice import predictions, score
from gpt2_ddp.model.gpt import GPT

HERE = DistContext()
FUZZ = settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return opinionated_model(block_size=160)


@pytest.fixture
def read(tmp_path: Path) -> list[Example]:
    return read_examples(write_examples(tmp_path / "val.jsonl", examples(40)))


def row_log_likelihoods(model: GPT, context: list[int], ending: list[int]) -> list[float]:
    """ln p of each token of `ending`, by one forward pass over one row and a softmax over every position."""
    with torch.no_grad():
        probabilities = model(torch.tensor([(context + ending)[:-1]]))[0].double().softmax(-1)
    return [math.log(probabilities[len(context) - 1 + at, token]) for at, token in enumerate(ending)]


def completion_scores(model: GPT, line: dict[str, Any], encoding: tiktoken.Encoding) -> tuple[list[float], list[float]]:
    """The sum and the mean over an ending's tokens; the context and " " + ending are tokenized apart."""
    sums, means = [], []
    for ending in line["endings"]:
        terms = row_log_likelihoods(model, encoding.encode(line["ctx"]), encoding.encode(" " + ending))
        sums.append(sum(terms))
        means.append(sum(terms) / len(terms))
    return sums, means


def harness_scores(model: GPT, line: dict[str, Any], encoding: tiktoken.Encoding) -> tuple[list[float], list[float]]:
    """The sum, and the sum by the ending's characters, after the harness's clean-up, step by step."""

    def clean(text: str) -> str:
        text = text.strip()
        text = ". ".join(text.split(" [title]"))
        while match := re.search(r"\[[^\]\n]*\]", text):
            text = text[: match.start()] + text[match.end() :]
        return "".join(text[at] for at in range(len(text)) if not (text[at] == " " and even_blank(text, at)))

    def even_blank(text: str, at: int) -> bool:
        """Whether the blank at `at` is the second, fourth, ... of its row, which replacing pairs takes away."""
        start = at
        while start and text[start - 1] == " ":
            start -= 1
        return (at - start) % 2 == 1

    ctx_b = line["ctx_b"][:1].upper() + line["ctx_b"][1:].lower()
    context = clean(f"{line['activity_label']}: {line['ctx_a']} {ctx_b}")
    blanks = len(context) - len(context.rstrip(" "))
    sums, by_character = [], []
    for ending in map(clean, line["endings"]):
        tokens = encoding.encode(context.rstrip(" "))
        whole = encoding.encode(context.rstrip(" ") + " " * blanks + " " + ending)
        assert whole[: len(tokens)] == tokens
        sums.append(sum(row_log_likelihoods(model, tokens, whole[len(tokens) :])))
        by_character.append(sums[-1] / len(ending))
    return sums, by_character


Scores = list[tuple[list[float], list[float]]]
SCORINGS = {"completion": completion_scores, "harness": harness_scores}


@pytest.fixture(scope="module")
def defined(model: GPT, encoding: tiktoken.Encoding) -> dict[str, Scores]:
    """What the definitions give for each of the 40 examples, by protocol."""
    return {
        protocol: [scoring(model, line, encoding) for line in examples(40)] for protocol, scoring in SCORINGS.items()
    }


@pytest.mark.parametrize("protocol", ["completion", "harness"])
@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_scores_are_those_of_the_definition(
    protocol: str,
    batch_tokens: int,
    model: GPT,
    read: list[Example],
    encoding: tiktoken.Encoding,
    defined: dict[str, Scores],
) -> None:
    questions = [render(example, protocol, encoding) for example in read]
    scores = score(model, questions, HERE, batch_tokens=batch_tokens)
    expected = defined[protocol]
    torch.testing.assert_close(
        scores, torch.tensor([sums for sums, _ in expected], dtype=torch.float64), atol=1e-3, rtol=0
    )
    chosen, chosen_norm = predictions(questions, scores)
    assert chosen.tolist() == [sums.index(max(sums)) for sums, _ in expected]
    assert chosen_norm.tolist() == [norms.index(max(norms)) for _, norms in expected]
    assert chosen.tolist() != chosen_norm.tolist()  # else one of them could stand for both
    assert len(set(chosen.tolist())) == 4


@pytest.mark.parametrize("protocol", ["completion", "harness"])
def test_results_are_counts_over_examples(
    protocol: str, model: GPT, read: list[Example], defined: dict[str, Scores]
) -> None:
    expected = defined[protocol]
    right = [sums.index(max(sums)) == line["label"] for (sums, _), line in zip(expected, examples(40), strict=True)]
    right_norm = [
        norms.index(max(norms)) == line["label"] for (_, norms), line in zip(expected, examples(40), strict=True)
    ]
    result = evaluate(model, read, protocol=protocol, context=HERE)
    assert (result.protocol, result.examples) == (protocol, 40)
    assert result.acc == sum(right) / 40
    assert result.acc_norm == sum(right_norm) / 40
    assert 0 < result.acc < 1
    variance = sum((hit - result.acc) ** 2 for hit in right) / 39  # of the sample
    assert result.acc_stderr == pytest.approx(math.sqrt(variance / 40))
    variance = sum((hit - result.acc_norm) ** 2 for hit in right_norm) / 39
    assert result.acc_norm_stderr == pytest.approx(math.sqrt(variance / 40))
    assert result.examples_per_sec > 0


def test_what_is_too_long_loses_tokens_on_the_left(read: list[Example], encoding: tiktoken.Encoding) -> None:
    """At 20 positions every case is met: all fits, some endings fit, none does, an ending alone is too long."""
    model = opinionated_model(block_size=20)
    read = [*read, replace(read[5], endings=("long " * 40, *read[5].endings[1:]))]
    questions = [render(example, "harness", encoding) for example in read]
    scores = score(model, questions, HERE, batch_tokens=64)
    overlong = 0
    for question, found in zip(questions, scores.tolist(), strict=True):
        for ending, got in zip(question.endings, found, strict=True):
            tokens = (question.context + ending)[-21:]  # 20 that are read, and the last that is only predicted
            context = tokens[: max(1, len(tokens) - len(ending))]
            assert got == pytest.approx(sum(row_log_likelihoods(model, context, tokens[len(context) :])), abs=1e-3)
            overlong += len(question.context + ending) > 21
    assert 20 < overlong < 4 * len(read) - 20


def test_an_evaluation_changes_nothing(read: list[Example]) -> None:
    model = GPT(replace(opinionated_model(64).config, dropout=0.5)).init_weights(0).train()
    still = GPT(replace(model.config, dropout=0.0)).init_weights(0).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = evaluate(model, read, protocol="completion", context=HERE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    same = evaluate(still, read, protocol="completion", context=HERE)
    assert not still.training
    assert replace(result, examples_per_sec=0.0) == replace(same, examples_per_sec=0.0)


def test_bfloat16_scores_are_near(model: GPT, read: list[Example], encoding: tiktoken.Encoding) -> None:
    questions = [render(example, "completion", encoding) for example in read]
    exact = score(model, questions, HERE)
    rounded = score(model, questions, HERE, autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).abs() / exact.abs()).max() < 0.05


def test_an_unknown_protocol_and_no_examples_are_refused(model: GPT, read: list[Example]) -> None:
    with pytest.raises(ValueError, match="unknown protocol 'zero-shot': choose one of completion, harness"):
        evaluate(model, read, protocol="zero-shot", context=HERE)
    with pytest.raises(ValueError, match="no HellaSwag examples"):
        evaluate(model, [], protocol="harness", context=HERE)


def test_reading_keeps_the_order_and_takes_labels_as_text_too(tmp_path: Path) -> None:
    lines = examples(6)
    lines[2]["label"] = str(lines[2]["label"])  # as the data set on the Hugging Face hub has it
    path = write_examples(tmp_path / "val.jsonl", lines)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    read = read_examples(path)
    assert [example.label for example in read] == [int(line["label"]) for line in lines]
    assert [list(example.endings) for example in read] == [line["endings"] for line in lines]
    assert read_examples(path, 2) == read[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"ctx": None}, "'ctx' is not a text"),
        ({"activity_label": ...}, "'activity_label' is missing"),
        ({"endings": ["a", "b", "c"]}, "'endings' is not a list of 4 texts"),
        ({"endings": ["a", "b", "c", 4]}, "'endings' is not a list of 4 texts"),
        ({"endings": "abcd"}, "'endings' is not a list of 4 texts"),
        ({"label": 4}, "'label' is '4', and must be a whole number from 0 to 3"),
        ({"label": ""}, "'label' is ''"),
        ({"label": True}, "'label' is 'True'"),
        ({"label": ...}, "'label' is 'None'"),
        ({"ctx": "x" * 70_000}, "longer than 65536 bytes"),
        ("[" * 60_000, "not JSON"),
        ('{"label": ' + "9" * 5000 + "}", "not JSON"),
        (b'{"ctx": "\xff\xfe"}', "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    lines = [json.dumps(example).encode() for example in examples(5)]
    if isinstance(line, dict):
        changed = {key: value for key, value in (examples(5)[3] | line).items() if value is not ...}
        line = json.dumps(changed)
    lines[3] = line.encode() if isinstance(line, str) else line
    path = tmp_path / "val.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 4: .*{re.escape(message)}"):
        read_examples(path)
    assert len(read_examples(path, 3)) == 3


def test_files_without_examples_name_the_command_that_fetches_them(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for path in (tmp_path / "empty.jsonl", tmp_path / "not_there.jsonl", tmp_path):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*python -m data_prep hellaswag"):
            read_examples(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(key=st.sampled_from(sorted(examples(1)[0])), value=JSON_VALUES, position=st.integers(0, 2))
def test_any_value_is_an_example_or_one_error(
    tmp_path: Path, encoding: tiktoken.Encoding, key: str, value: Any, position: int
) -> None:
    lines = examples(3)
    lines[position][key] = value
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read_or_refuse(path, encoding)


@FUZZ
@given(content=st.binary(max_size=200), cut=st.integers(0, 900))
def test_any_bytes_are_examples_or_one_error(
    tmp_path: Path, encoding: tiktoken.Encoding, content: bytes, cut: int
) -> None:
    path = tmp_path / "val.jsonl"
    path.write_bytes(json.dumps(examples(1)[0]).encode()[:cut] + content)
    read_or_refuse(path, encoding)


def read_or_refuse(path: Path, encoding: tiktoken.Encoding) -> None:
    """What is read can be rendered; what is not is refused with the file's name; both soon."""
    start = time.perf_counter()
    said = str(path)
    try:
        for example in read_examples(path):
            for protocol in ("completion", "harness"):
                question = render(example, protocol, encoding)
                assert question.context
                assert all(question.endings)
    except ValueError as error:
        said = str(error)
    assert str(path) in said
    assert "\n" not in said.removeprefix(str(path))
    assert time.perf_counter() - start < 1


def test_a_file_without_line_ends_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    start = time.perf_counter()
    with pytest.raises(ValueError, match="line 1: longer than 65536 bytes"):
        read_examples(path)
    assert time.perf_counter() - start < 1
