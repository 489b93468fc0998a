"""Watching a run changes nothing: evaluation, sampling, logging and saving leave every byte of the weights alone."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drivers import warm
from hellaswag_examples import examples, write_examples
from recomputed import loss_of
from running import SMALL as TWENTY_STEPS
from running import checkpoint, final_hashes, metrics, tree
from safetensors.torch import load_file

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation import sampling
from gpt2_ddp.evaluation.hellaswag import HellaSwagResult, evaluate, read_examples
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.metrics.timer import StepTimer
from gpt2_ddp.model.huggingface import load_model

SMALL = ("--model", "gpt2-nano", "--max-steps", "6", "--dropout", "0.1")
"""A model with the whole vocabulary, for the tokenizer's sake; dropout, so that a random number drawn would show."""


@pytest.fixture(scope="module")
def hellaswag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    example = {
        "ind": 1,
        "activity_label": "Sewing",
        "ctx_a": "She threads a needle.",
        "ctx_b": "then she",
        "ctx": "She threads a needle. then she",
        "split_type": "indomain",
        "label": 0,
        "endings": ["sews a button on.", "flies to the moon.", "is a needle.", "eats the thread, twice."],
    }
    file.write_text("".join(json.dumps(example | {"ind": number}) + "\n" for number in range(3)))
    return file


@pytest.fixture(scope="module")
def unwatched(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("unwatched") / "run"
    warm.train(out_dir, data_dir, *SMALL, "--log-every", "6", "--checkpoint-every", "0", "--check-ranks-every", "0")
    return out_dir


def cadences(hellaswag: Path, *, val: int, scored: int, sample: int, log: int, save: int) -> list[str]:
    numbers = {"val": val, "hellaswag": scored, "sample": sample, "log": log, "checkpoint": save}
    every = [part for name, number in numbers.items() for part in (f"--{name}-every", str(number))]
    return [*SMALL, *every, "--val-tokens", "64", "--hellaswag-data", str(hellaswag)]


def counted(out_dir: Path, event: str) -> dict[int, int]:
    """How often each step has such a line."""
    return dict(Counter(entry["step"] for entry in metrics(out_dir, event)))


@pytest.mark.parametrize(
    ("val", "scored", "sample", "log", "save"), [(1, 1, 1, 1, 1), (2, 0, 3, 1, 0), (0, 5, 0, 4, 2)]
)
def test_any_cadence_gives_the_same_weights(
    unwatched: Path, hellaswag: Path, data_dir: Path, tmp_path: Path, val: int, scored: int, sample: int, log: int,
    save: int,
) -> None:  # fmt: skip
    flags = cadences(hellaswag, val=val, scored=scored, sample=sample, log=log, save=save)
    done = warm.train(tmp_path / "run", data_dir, *flags)
    assert final_hashes(tmp_path / "run") == final_hashes(unwatched)
    assert done.stdout.count("3 of 3 examples cut on the left") == (scored and 6 // scored + bool(6 % scored))
    if sample:  # reads no more tokens at once than the run is trained with
        model, prompt = load_model(checkpoint(tmp_path / "run")), load_tokenizer().encode(sampling.PROMPT)
        [row] = generate(model, prompt, max_new_tokens=48, top_k=50, seed=1337 + 6, sequence_length=8).tolist()
        assert metrics(tmp_path / "run", "sample")[-1]["text"] == load_tokenizer().decode(row)
    for event, every in (("val", val), ("hellaswag", scored), ("sample", sample), ("train", log)):
        due = [step for step in range(1, 7) if every and (step % every == 0 or step == 6)]
        assert counted(tmp_path / "run", event) == dict.fromkeys(due, 1)


def test_the_compiled_module_only_trains(unwatched: Path, hellaswag: Path, data_dir: Path, tmp_path: Path) -> None:
    flags = cadences(hellaswag, val=2, scored=3, sample=2, log=1, save=3)
    counted_calls = {"watch_compiled": {"listing": str(tmp_path / "calls")}}
    done = warm.train(tmp_path / "run", data_dir, *flags, "--compile", "on", faults=counted_calls)
    assert "torch.compile failed" not in done.stderr
    [calls] = tmp_path.glob("calls.*")
    assert json.loads(calls.read_text()) == {"train": 6 * 4 * 2, "other": 0, "graphs": 1, "later graphs": 0}
    saved = [load_file(checkpoint(path) / "model.safetensors").keys() for path in (tmp_path / "run", unwatched)]
    assert saved[0] == saved[1]


def test_ranks_compile_one_graph_for_all_blocks_and_none_after_the_warm_up(data_dir: Path, tmp_path: Path) -> None:
    """DDP, which could cut a graph where its buckets end, changes nothing; in bfloat16 the head's loss is another."""
    counted_calls = {"watch_compiled": {"listing": str(tmp_path / "calls")}}
    flags = ("--max-steps", "3", "--compile", "on", "--dtype", "bfloat16", "--dropout", "0.1")
    warm.fork_ranks(2, tmp_path / "run", data_dir, *flags, faults=counted_calls)
    ranks = [json.loads(calls.read_text()) for calls in tmp_path.glob("calls.*")]
    losses = 3 * 2  # computed with their gradients, for which autograd is not needed
    assert ranks == [{"train": losses * 2, "other": losses, "graphs": 2, "later graphs": 0}] * 2


def test_the_device_is_waited_for_in_logged_steps_alone(data_dir: Path, tmp_path: Path) -> None:
    """On a GPU each such read is a halt. In float16, since a `GradScaler` has the most to ask."""
    reads = {"watch_reads": {"listing": str(tmp_path / "reads")}}
    flags = ("--log-every", "5", "--checkpoint-every", "0", "--dtype", "float16")
    warm.train(tmp_path / "run", data_dir, *flags, faults=reads)
    assert json.loads((tmp_path / "reads").read_text()) == [5, 10, 12]


def test_after_restarts_no_line_is_twice_or_missing(
    unwatched: Path, hellaswag: Path, data_dir: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    flags = cadences(hellaswag, val=1, scored=2, sample=3, log=1, save=2)
    killed = {"kill": {"steps": [2, 3, 4, 6]}}
    for _ in killed["kill"]["steps"]:
        warm.train(out_dir, data_dir, *flags, faults=killed, status=-signal.SIGKILL)
    with (out_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')  # torn by the last death
    warm.train(out_dir, data_dir, *flags, faults=killed)
    assert final_hashes(out_dir) == final_hashes(unwatched)
    assert counted(out_dir, "train") == counted(out_dir, "val") == dict.fromkeys(range(1, 7), 1)
    assert counted(out_dir, "hellaswag") == {2: 1, 4: 1, 6: 1}
    assert counted(out_dir, "sample") == {3: 1, 6: 1}


def test_a_finished_run_is_left_alone(unwatched: Path, data_dir: Path) -> None:
    before = tree(unwatched)
    done = warm.train(unwatched, data_dir, *SMALL)
    assert "nothing to do" in done.stdout
    assert tree(unwatched / "checkpoints") == {
        name.removeprefix("checkpoints/"): digest for name, digest in before.items() if name.startswith("checkpoints/")
    }
    assert checkpoint(unwatched).name == "step_00000006"


def test_the_clock_waits_for_the_device_only_where_something_heavy_follows(data_dir: Path, tmp_path: Path) -> None:
    cadence = ["--log-every", "5", "--val-every", "4", "--val-tokens", "64", "--checkpoint-every", "6",
               "--check-ranks-every", "7"]  # fmt: skip
    listing = tmp_path / "waited"
    warm.train(tmp_path / "run", data_dir, *cadence, faults={"watch_clock": {"listing": str(listing)}})
    assert json.loads(listing.read_text()) == [4, 5, 6, 7, 8, 10, 12]


def test_what_the_device_still_computes_counts_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock and a device of our own: the host is told to do 2 s of steps' work in no time, four times."""
    clock = {"now": 100.0, "device is done": 100.0}

    def give(seconds: float) -> None:
        clock["device is done"] = max(clock.values()) + seconds

    def synchronize(device: torch.device) -> None:
        assert device == torch.device("cuda", 1)
        clock["now"] = max(clock.values())

    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    timer = StepTimer(torch.device("cuda", 1))
    for heavy in (False, True, False, False):
        give(2.0)
        with timer.paused(due=heavy):
            if heavy:
                give(50.0)
            else:
                clock["now"] += 0.5  # the host waits for other hosts while its device computes
        if not heavy:
            assert clock["now"] < clock["device is done"]
    assert timer.restart() == 8.0
    assert clock["now"] == 158.0


def scored_alone(run: Path, file: Path, protocol: str) -> tuple[HellaSwagResult, int]:
    """What one process gives for a run's last checkpoint, and how many tokens it reads for that."""
    model, tokens = load_model(checkpoint(run)), list[int]()
    model.wte.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    found = evaluate(model, read_examples(file), protocol=protocol, context=DistContext(), sequence_length=16)
    return found, sum(tokens)


def test_two_ranks_watch_together(clean_run: Callable[..., Path], data_dir: Path, tmp_path: Path) -> None:
    """They share the work, change nothing, and what is no training counts neither in `dt` nor in rates.

    By the clock a training step of 128 tokens takes a second, and each thing that is done between steps a hundred.
    """
    out_dir, file = tmp_path / "run", write_examples(tmp_path / "hellaswag.jsonl", examples(12))
    flags = [part for name, value in TWENTY_STEPS.items() for part in (f"--{name}", value)]
    cadence = ["--val-every=3", "--val-tokens=160", "--sample-every=7", "--checkpoint-every=4", "--keep-checkpoints=1",
               "--log-every=5", "--hellaswag-every=8", f"--hellaswag-data={file}", "--hellaswag-protocol=harness",
               "--check-ranks-every=3", "--tensorboard"]  # fmt: skip
    watchers = {"work_clock": {"step": 1.0, "beside": 100.0}, "known_peak": {"flops": 5e9},
                "watch_shares": {"listing": str(tmp_path / "rank")}}  # fmt: skip
    done = warm.fork_ranks(2, out_dir, data_dir, *flags, *cadence, faults=watchers)
    assert final_hashes(out_dir) == final_hashes(clean_run(nproc=2))

    clean = {entry["step"]: entry for entry in metrics(clean_run(nproc=2))}
    assert [entry["step"] for entry in metrics(out_dir)] == [5, 10, 15, 20]
    assert all(e["loss"] == clean[e["step"]]["loss"] for e in metrics(out_dir))
    happened = {event: [e["step"] for e in metrics(out_dir, event)] for event in ("val", "sample", "hellaswag")}
    assert happened == {"val": [3, 6, 9, 12, 15, 18, 20], "sample": [7, 14, 20], "hellaswag": [8, 16, 20]}
    assert [e["step"] for e in metrics(out_dir, "checkpoint")] == [4, 8, 12, 16, 20]
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["step_00000020"]
    assert [e["world_size"] for e in metrics(out_dir, "start")] == [2]
    losses = [e["val_loss"] for e in metrics(out_dir, "val")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(loss_of(checkpoint(out_dir), data_dir, 10), abs=1e-4)  # of both ranks
    assert {e["tokens"] for e in metrics(out_dir, "val")} == {160}
    text = load_tokenizer().decode_bytes(find_shards(data_dir, "val")[0].open()[1:161].tolist())
    bits = [e["bits_per_byte"] for e in metrics(out_dir, "val")]
    assert bits == pytest.approx([loss * 160 / math.log(2) / len(text) for loss in losses])
    assert metrics(out_dir, "sample")[-1]["text"].startswith("Language is")
    assert "step 20 | sample: Language is" in done.stdout
    assert list((out_dir / "tensorboard").iterdir())

    scored, tokens = scored_alone(out_dir, file, "harness")
    last = metrics(out_dir, "hellaswag")[-1]
    told = (last["protocol"], last["acc"], last["acc_norm"], last["examples"])
    assert told == (scored.protocol, scored.acc, scored.acc_norm, 12)
    assert (scored.acc, scored.acc_norm) != tuple(vars(scored_alone(out_dir, file, "completion")[0])[name]
                                                  for name in ("acc", "acc_norm"))  # fmt: skip
    shares = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert [share["Validation"] for share in shares] == [7 * 80, 7 * 80]
    assert sum(share["HellaSwag"] for share in shares) == 3 * tokens

    flops = 6 * (2 * 12 * 64**2 + 50304 * 64) + 12 * 2 * 64 * 16  # a token: 6 a weight, and attention's two products
    for entry in metrics(out_dir):
        assert entry["step_ms"] == pytest.approx(1000, rel=1e-4)
        assert entry["tokens_per_sec"] == pytest.approx(128, rel=1e-4)
        assert entry["mfu"] == pytest.approx(128 * flops / (2 * 5e9), abs=1e-4)
        assert entry["data_wait_ms"] < 1
