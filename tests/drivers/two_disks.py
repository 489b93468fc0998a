"""Two ranks of which the second has nothing on its disk: a fresh start, a resume, a way back, and a broken file.

`torchrun --nproc_per_node=2 tests/drivers/two_disks.py FOLDER`; each rank prints that it is through.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from drivers.live_bytes import LiveBytes

from gpt2_ddp.build.making import start_model
from gpt2_ddp.checkpoint import files as checkpoint
from gpt2_ddp.checkpoint.state import (
    Found,
    TrainState,
    checkpoint_files,
    newest_checkpoint,
    restore,
    weights_and_moments,
)
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext, open_context
from gpt2_ddp.distributed.wrapping import release, wrap
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.optim.updates import SkipCount

DEEP = GPTConfig(block_size=32, vocab_size=512, n_layer=8, n_head=2, n_embd=32)
"""Of whose weights the largest tensor is less than a seventh."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors.values())).hexdigest()


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def new_state() -> TrainState:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(skips=SkipCount(torch.device("cpu")), guard=SpikeGuard(6.0, 3), scaler=scaler)


def write(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    state = new_state()
    state.step = 3
    files = checkpoint_files(state, model, optimizer, facts={"config": {}})
    checkpoint.write_checkpoint(Path("run/checkpoints/step_00000003"), files)


def fresh_start(context: DistContext, config: TrainConfig) -> str:
    """Both ranks begin with the weights of rank 0's seed. Leaves on its disk a checkpoint, whose digest comes back."""
    model, optimizer = start_model(config, context, Found())
    first = digest(dict(GPT(DEEP).init_weights(11).named_parameters()))
    assert context.gather(digest(dict(model.named_parameters()))) == [first, first]
    everything = weights_and_moments(model, optimizer)
    torch.manual_seed(context.rank)
    for tensor in everything.values():
        tensor.data.copy_(torch.rand(tensor.shape) + 1)
    if context.is_main:
        write(model, optimizer)
    assert context.gather(Path("run").exists()) == [True, False]
    return context.broadcast(digest(everything))


def resumed(context: DistContext, config: TrainConfig, found: Found, saved: str) -> None:
    """Everything of the checkpoint is on both ranks, in a new model and in one that goes back, and is there once."""
    state = new_state()
    with LiveBytes() as live:
        model, optimizer = start_model(config, context, found)
        restore(found, context, state, model, optimizer)
    assert state.step == 3
    everything = weights_and_moments(model, optimizer)
    assert context.gather(digest(everything)) == [saved, saved]
    whole, weights = size(everything), size(dict(model.named_parameters()))
    few = 2 * max(tensor.nbytes for tensor in everything.values())
    assert few < weights / 3
    assert live.peak <= whole + weights + few, (live.peak, whole, weights)  # with the gradients

    for tensor in everything.values():
        tensor.data.fill_(context.rank)
    places = [tensor.data_ptr() for tensor in everything.values()]
    with LiveBytes() as live:
        restore(found, context, state, model, optimizer)
    everything = weights_and_moments(model, optimizer)
    assert context.gather(digest(everything)) == [saved, saved]
    assert [tensor.data_ptr() for tensor in everything.values()] == places
    assert live.peak <= whole + few, (live.peak, whole)

    model.wte.weight.data[0, 0] = context.rank
    wrapped = wrap(model, context)
    assert context.gather(float(model.wte.weight[0, 0])) == [0.0, 1.0]  # DDP does not send what is there already
    release(wrapped)


def broken(context: DistContext, config: TrainConfig, found: Found) -> None:
    """What rank 0 cannot read is both ranks' error, and none waits for the other."""
    model, optimizer = start_model(config, context, found)
    for name in ("optimizer", "model"):
        if context.is_main:
            os.truncate(f"{found.path}/{name}.safetensors", 100)
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            restore(found, context, new_state(), model, optimizer)
    with pytest.raises(ValueError, match=r"w1 \(2,\) torch.float32 where rank 0 has w0 \(2,\) torch.float32"):
        context.broadcast_tensors({f"w{context.rank}": torch.zeros(2)})
    assert context.max(context.rank) == 1


def try_all(context: DistContext) -> None:
    config = TrainConfig(model="gpt2-deep", sequence_length=16, seed=11 + context.rank)
    saved = fresh_start(context, config)
    found = context.run_on_main(lambda: newest_checkpoint(Path("run/checkpoints")))
    resumed(context, config, found, saved)
    broken(context, config, found)


if __name__ == "__main__":
    SIZES["gpt2-deep"] = DEEP
    with open_context("cpu") as here:
        disk = Path(sys.argv[1]) / f"disk{here.rank}"
        disk.mkdir()
        os.chdir(disk)
        try_all(here)
    sys.stdout.write(f"rank {here.rank} is through\n")
