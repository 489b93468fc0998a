"""Ranks together, on real processes and gloo: gradients, reductions, and errors that one of them has."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from drivers import warm
from running import ROOT, SMALL, train_command, wait_until
from safetensors.torch import load_file
from torch import Tensor

from gpt2_ddp.data.order import permute
from gpt2_ddp.distributed import context
from gpt2_ddp.distributed.context import Pulse, open_context
from gpt2_ddp.distributed.rendezvous import Place
from gpt2_ddp.distributed.watchdog import Watchdog
from gpt2_ddp.distributed.wrapping import wrap
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.run import Run
from gpt2_ddp.system.hardware import choose_device


@pytest.fixture(scope="module")
def first_update(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Callable[[int, int], Path]:
    """`first_update(ranks, micro_batch_size)`: where every rank left its gradients and its number of all-reduces."""
    done: dict[tuple[int, int], Path] = {}

    def trained(ranks: int, micro_batch_size: int) -> Path:
        if (ranks, micro_batch_size) not in done:
            folder = tmp_path_factory.mktemp("spy")
            flags = [
                f"--micro-batch-size={micro_batch_size}",
                "--total-batch-size=256",
                "--max-steps=1",
                "--grad-clip=0",
            ]
            argv = train_command(folder / "run", data_dir, *flags)[3:]
            warm.fork_trainers(ranks, argv, faults={"watch_update": {"folder": str(folder)}})
            done[ranks, micro_batch_size] = folder
        return done[ranks, micro_batch_size]

    return trained


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of the two gradients as vectors; and no single tensor may stand out."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm()) <= 1e-5 * float(tensor.norm()), name
    difference = sum(float((tensor - other[name]).double().norm()) ** 2 for name, tensor in one.items())
    return float((difference / sum(float(tensor.double().norm()) ** 2 for tensor in one.values())) ** 0.5)


@pytest.fixture(scope="module")
def whole_batch(data_dir: Path) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of the first step in one pass over all its sequences, which no part of the trainer shares."""
    length, total = int(SMALL["sequence-length"]), 256
    windows: list[list[int]] = []
    for path in sorted(data_dir.glob("train_*.bin")):
        tokens = torch.frombuffer(bytearray(path.read_bytes()[1024:]), dtype=torch.uint16).tolist()
        windows += [tokens[at : at + length + 1] for at in range(0, len(tokens) - length, length)]
    order = permute(torch.arange(total // length).numpy(), n=len(windows), seed=1337, epoch=0)
    batch = torch.tensor([windows[window] for window in order])
    model = GPT(model_config("gpt2-nano")).init_weights(1337).double()
    logits = model(batch[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


@pytest.mark.parametrize(("ranks", "micro_batch_size", "micro_steps"), [(1, 4, 4), (2, 4, 2), (4, 4, 1)])
def test_gradients_are_the_same_however_the_batch_is_divided(
    first_update: Callable[[int, int], Path],
    whole_batch: tuple[dict[str, Tensor], float],
    ranks: int,
    micro_batch_size: int,
    micro_steps: int,
) -> None:
    folder = first_update(ranks, micro_batch_size)
    expected, loss = whole_batch
    for rank in range(ranks):
        told = json.loads((folder / f"rank{rank}.json").read_text())
        assert told["micro_steps"] == micro_steps
        assert told["loss"] == pytest.approx(loss, abs=1e-5)
        gradients = load_file(folder / f"rank{rank}.safetensors")
        assert relative_difference(expected, gradients) < 1e-6
    alone = load_file(first_update(1, 4) / "rank0.safetensors")
    assert relative_difference(alone, gradients) < 1e-6


def test_gradients_are_reduced_once_an_update_however_many_micro_steps(
    first_update: Callable[[int, int], Path],
) -> None:
    counts = {}
    for ranks, micro_batch_size in ((1, 4), (2, 4), (4, 4)):
        told = json.loads((first_update(ranks, micro_batch_size) / "rank0.json").read_text())
        counts[ranks, told["micro_steps"]] = told["all_reduces"]
    assert counts[1, 4] == 0
    assert counts[4, 1] == counts[2, 2] > 0
    assert counts[2, 2] <= 4  # 13 MB of gradients lie in one or two buckets; one more for the loss


COLLECTIVES = """
import os
import sys
from contextlib import suppress
import torch
import torch.distributed as dist
from gpt2_ddp.distributed.context import Pulse, open_context
from gpt2_ddp.distributed.wrapping import wrap
from gpt2_ddp.distributed.watchdog import Watchdog

def raised(make, kind):
    try:
        make()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")

def fail_on(rank, error):
    def make():
        if context.rank == rank:
            raise error
        return "fine"
    return make

with suppress(KeyError), open_context("cpu") as context:
    rank, others = context.rank, context.world_size - 1
    assert context.world_size == int(os.environ["WORLD_SIZE"]) == 2
    assert dist.get_backend() == "gloo"
    tensor = torch.tensor([rank + 1.0, 10.0])
    assert context.sum(tensor) is tensor
    assert tensor.tolist() == [3.0, 20.0]
    assert context.max(rank * 7 - 1) == 6
    assert context.any(rank == 1) and not context.any(False)
    assert context.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert context.broadcast(f"from {rank}") == "from 0"

    assert context.run_on_all(lambda: rank) == rank
    for failing in (0, 1):
        said = raised(lambda: context.run_on_all(fail_on(failing, ValueError("no such shard"))), ValueError)
        assert said == ("no such shard" if rank == failing else f"rank {failing}: no such shard"), said
    said = raised(lambda: context.run_on_all(fail_on(1, OSError(30, "Read-only file system"))), (OSError, ValueError))
    assert "Read-only file system" in said
    said = raised(lambda: context.run_on_all(fail_on(rank, ValueError(f"mine is {rank}"))), ValueError)
    assert said == f"mine is {rank}"

    calls = []
    assert context.run_on_main(lambda: calls.append(1) or {"step": 4}) == {"step": 4}
    assert len(calls) == (1 if rank == 0 else 0)
    assert "broken" in raised(lambda: context.run_on_main(lambda: fail_on(rank, ValueError("broken"))()), ValueError)

    wanted = {
        "float32": torch.arange(6.0).view(2, 3), "bfloat16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "int64": torch.tensor([2**60]), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    found = {name: tensor.clone() if rank == 0 else torch.zeros_like(tensor) for name, tensor in wanted.items()}
    context.broadcast_tensors(found)
    for name, tensor in wanted.items():
        assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name

    mine = torch.tensor([1.0, 2.0]) * 10**rank
    context.add_from(1 - rank, mine)
    assert mine.tolist() == [11.0, 22.0]

    ddp = wrap(torch.nn.Linear(2, 2), context)
    assert type(ddp).__name__ == "DistributedDataParallel"
    assert ddp.gradient_as_bucket_view and not ddp.static_graph

    def patience():
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    assert patience() == 1800
    Watchdog(context, 5.0).watch()  # as after the first step
    assert patience() == 35
    sys.stdout.write(f"rank {rank} is through\\n")  # in one piece: print writes the line end apart
    raise KeyError  # the group is destroyed also after an error
assert not dist.is_initialized()
"""


def test_what_the_ranks_say_to_each_other(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    done = warm.fork_program(str(script), nproc=2)
    assert sorted(done.stdout.splitlines()) == ["rank 0 is through", "rank 1 is through"]


def test_a_rank_without_a_disk_is_given_everything_and_holds_it_once(tmp_path: Path) -> None:
    done = warm.fork_program(str(ROOT / "tests" / "drivers" / "two_disks.py"), str(tmp_path), nproc=2)
    assert sorted(done.stdout.splitlines()) == ["rank 0 is through", "rank 1 is through"]


def test_a_single_process_needs_no_group() -> None:
    with open_context("cpu") as context:
        assert (context.rank, context.world_size, context.is_main) == (0, 1, True)
        assert context.device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        assert context.sum(torch.tensor(2.0)) == 2
        assert (context.max(-3), context.any(True), context.any(False)) == (-3, True, False)
        assert context.gather("x") == ["x"]
        assert context.broadcast("x") == context.run_on_all(lambda: "x") == context.run_on_main(lambda: "x") == "x"
        linear = torch.nn.Linear(2, 2)
        assert wrap(linear, context) is linear
        with pytest.raises(ValueError, match="mine"):
            context.run_on_all(lambda: (_ for _ in ()).throw(ValueError("mine")))


class Store(dict[str, str]):
    """The ranks' store, as far as a watchdog looks at it."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return self.keys() >= set(keys)


@pytest.mark.parametrize("standing_by", [False, True])
def test_a_rank_that_finishes_a_save_at_its_end_shows_that_it_lives_and_waits_for_nobody(
    standing_by: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has left."""
    run = MagicMock()
    Run.close(run)
    calls = [name for name, *_ in run.mock_calls]
    assert calls.index("watchdog.stand_by") < calls.index("writer.close") < calls.index("watchdog.dismiss")
    store = Store({"watchdog/1": json.dumps({"beats": 3, "ticks": 9, "host": "other", "pid": 1})})
    two = MagicMock(rank=0, world_size=2, store=store, pulse=Pulse())
    left: list[str] = []
    monkeypatch.setattr(Watchdog, "_leave", lambda _, why, **__: left.append(why))
    dog = Watchdog(two, 0.3, asked=lambda: True)
    if standing_by:
        dog.stand_by()
    dog.watch()
    wait_until(lambda: left or json.loads(store["watchdog/0"])["ticks"] > 40)
    dog.dismiss()
    dog.join()
    assert bool(left) != standing_by


def test_a_device_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU is visible: use --device cpu"):
            choose_device("cuda", local_rank=0, local_world_size=1)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no Metal GPU: use --device cpu"):
            choose_device("mps", local_rank=0, local_world_size=1)
    assert choose_device("cpu", local_rank=3, local_world_size=4) == torch.device("cpu")


@pytest.mark.parametrize(("device", "fails", "destroyed"), [("cpu", True, 1), ("cuda", True, 0), ("cuda", False, 1)])
def test_after_an_error_a_rank_does_not_wait_for_the_others_to_take_nccl_apart(
    device: str, fails: bool, destroyed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destroying is collective under NCCL, and no other rank may come to it."""
    asked: list[bool] = []
    place = Place(rank=1, world_size=2, local_rank=1, local_world_size=2)
    monkeypatch.setattr(context, "find_place", lambda _: place)
    monkeypatch.setattr(context, "choose_device", lambda *_, **__: torch.device(device))
    monkeypatch.setattr(context, "meet", lambda _: (dist.HashStore(), "tests"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append(True))
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), open_context():
        assert 1 / (0 if fails else 1)
    assert len(asked) == destroyed
