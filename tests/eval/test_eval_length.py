"""What depends on the length of a sequence takes the one that the run was trained with; how much is read at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivers.live_bytes import LiveBytes
from hellaswag_examples import examples, opinionated_model, write_examples, write_model
from running import write_shards

from eval.convert import Convert
from eval.hellaswag import HellaSwag
from eval.model_choice import Computing, ModelChoice, choose_length, open_model
from eval.sample import Sample
from eval.val_loss import ValLoss, forward_memory, largest_micro_batch
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.hellaswag import evaluate, read_examples
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.model.vocabulary import EOT

BLOCK, TRAINED = 160, 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that was trained at 24 tokens has in a checkpoint for other commands, of a model that takes 160."""
    folder = write_model(tmp_path_factory.mktemp("length") / "model", opinionated_model(BLOCK))
    (folder / "trainer_state.json").write_text(json.dumps({"config": {"sequence_length": TRAINED}}))
    return folder


def narrow(folder: Path) -> GPT:
    """The model in `folder` as if it took no more than 24 tokens."""
    model = load_model(folder)
    short = GPT(replace(model.config, block_size=TRAINED))
    tensors = model.state_dict()
    short.load_state_dict(tensors | {"wpe.weight": tensors["wpe.weight"][:TRAINED]})
    return short


def ran(command: type[Computing], folder: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> tuple[Any, str]:
    """What a command wrote to its JSON file, and what it said on stderr."""
    file = folder.parent / "answer.json"
    model = (str(folder),) if command is Sample else str(folder)
    command(model=model, device="cpu", dtype="float32", json=file, **flags).run()  # type: ignore[call-arg, attr-defined]
    return json.loads(file.read_text()), capsys.readouterr().err


def test_val_loss_takes_the_trained_length_and_warns_of_a_longer_one(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shards(tmp_path / "data", val_tokens=(700,))
    found = {
        length: ran(ValLoss, trained, capsys, data_dir=data, val_tokens=480, sequence_length=length)
        for length in (None, 12, TRAINED, 48)
    }
    assert found[None] == found[TRAINED]
    assert [said for _, said in found.values()] == [
        "", "", "", "warning: --sequence-length 48: the run was trained with 24, and knows nothing of later positions\n"
    ]  # fmt: skip
    assert len({answer["val_loss"] for answer, _ in found.values()}) == 3
    Convert(source=str(trained), target=tmp_path / "converted").run()
    assert "warning: trained with 24 tokens at once" in capsys.readouterr().err
    assert ran(ValLoss, tmp_path / "converted", capsys, data_dir=data, val_tokens=480) == found[None]
    (trained / "trainer_state.json").rename(tmp_path / "state.json")
    try:
        assert ran(ValLoss, trained, capsys, data_dir=data, val_tokens=480)[0]["tokens"] == 480 // BLOCK * BLOCK
    finally:
        (tmp_path / "state.json").rename(trained / "trainer_state.json")


def test_a_sample_sees_no_more_than_the_trained_length(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoding = load_tokenizer()
    for prompt, wanted in (("one two", ""), ("one two " * 20, "warning: of the prompt's {} tokens only the last 24")):
        ids = [EOT, *encoding.encode(prompt)]
        found, said = ran(Sample, trained, capsys, prompt=prompt, max_new_tokens=30, top_k=None)
        [row] = generate(narrow(trained), [ids], max_new_tokens=30, seed=42, stop_at_eot=True).tolist()
        assert found["samples"] == [encoding.decode(row[1 : row.index(EOT, 1) if EOT in row[1:] else None])]
        assert said.startswith(wanted.format(len(ids)))
        assert bool(said) == bool(wanted)


def test_examples_longer_than_the_trained_length_are_cut_and_counted(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_examples(tmp_path / "val.jsonl", examples(30))
    found, said = ran(HellaSwag, trained, capsys, data=data)
    expected = evaluate(narrow(trained), read_examples(data), protocol="completion", context=DistContext())
    whole = evaluate(load_model(trained), read_examples(data), protocol="completion", context=DistContext())
    assert 0 < expected.cut < 30
    assert whole.cut == 0
    assert [found["acc"], found["acc_norm"]] == [expected.acc, expected.acc_norm]
    assert [found["acc"], found["acc_norm"]] != [whole.acc, whole.acc_norm]
    assert f"warning: {expected.cut} of 30 examples are longer than 24 tokens" in said
    assert "longer than" not in ran(HellaSwag, trained, capsys, data=data, sequence_length=BLOCK)[1]


@pytest.mark.parametrize("length", [0, -3, BLOCK + 1, True, "24", None, 2.0])
def test_a_state_that_tells_no_length_is_one_error(tmp_path: Path, length: object) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"config": {"sequence_length": length}}))
    with pytest.raises(ValueError, match=r"trainer_state\.json: config\.sequence_length cannot be"):
        choose_length(None, tmp_path, BLOCK)
    (tmp_path / "trainer_state.json").write_text('{"config": []}')
    with pytest.raises(ValueError, match="cannot be 'None'"):
        choose_length(7, tmp_path, BLOCK)
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"trained_sequence_length": length}))
    with pytest.raises(ValueError, match=r"config\.json: trained_sequence_length cannot be"):
        choose_length(None, tmp_path, BLOCK)


@pytest.mark.parametrize(("vocab_size", "at_least"), [(512, 0.95), (4096, 0.85)], ids=["a block", "the head"])
def test_a_forward_pass_holds_what_is_reckoned(vocab_size: int, at_least: float) -> None:
    """Of the tensors that live at once beside the weights, counted on a CPU."""
    config = GPTConfig(block_size=256, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=128)
    model, ids = GPT(config).init_weights(0), torch.zeros(8, 256, dtype=torch.int64)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad(), LiveBytes() as live:
        model(ids, ids)
    reckoned = forward_memory(config, ids.numel(), dtype=torch.float32, device_type="cpu")
    assert at_least < (live.peak - weights) / reckoned < 1.05


def test_the_micro_batch_of_an_evaluation_keeps_the_device_busy_and_fits() -> None:
    def size(name: str, length: int, dtype: torch.dtype, device_type: str, gigabytes: float) -> int:
        memory = int(gigabytes * 1e9)
        return largest_micro_batch(
            SIZES[name], sequence_length=length, dtype=dtype, device_type=device_type, memory=memory
        )

    assert size("gpt2", 1024, torch.bfloat16, "cuda", 70) == 64
    assert size("gpt2", 1000, torch.bfloat16, "cuda", 70) == 64
    assert size("gpt2-nano", 16, torch.bfloat16, "cuda", 70) == 4096
    assert 1 < size("gpt2-xl", 1024, torch.float16, "cuda", 8) < 64
    assert size("gpt2-xl", 1024, torch.float16, "cuda", 1) == 1
    assert size("gpt2", 1024, torch.float32, "cpu", 16) == 4


def test_auto_is_no_more_than_rounding(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shards(tmp_path / "data", val_tokens=(700,))
    found = [
        ran(ValLoss, trained, capsys, data_dir=data, **flags)[0] for flags in ({}, {"micro_batch_size": 3})
    ]  # fmt: skip
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], abs=1e-5)
    assert found[0]["tokens"] == found[1]["tokens"] == 29 * TRAINED
    with open_model(ModelChoice(model=str(trained), device="cpu")) as opened:
        assert opened.sequence_length == TRAINED
