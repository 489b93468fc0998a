"""What an update costs, AdamW's and Muon's, on 1, 2 and 4 ranks of one thread.

    python tests/muon_cost.py [--model gpt2-mini] [--repeats 5]

The gradients are random, and nothing else is computed. Seconds are those of the wall clock, medians of the updates
after the first; processor seconds those that rank 0 spends on one, which is what its own part of the work takes where
there are fewer cores than ranks.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402  the folders of the tests and of the project come first
from running import environment, python  # noqa: E402

from gpt2_ddp.build.rules import optimizer_rule  # noqa: E402
from gpt2_ddp.config import TrainConfig  # noqa: E402
from gpt2_ddp.distributed.context import DistContext, open_context  # noqa: E402
from gpt2_ddp.model.gpt import GPT, model_config  # noqa: E402
from gpt2_ddp.optim.updates import set_learning_rate  # noqa: E402

RANKS = (1, 2, 4)


def update_seconds(context: DistContext, optimizer_name: str, model_name: str, repeats: int) -> tuple[float, float]:
    """Of one update, by the wall clock and of this rank's processor."""
    model = GPT(model_config(model_name)).init_weights(0)
    optimizer = optimizer_rule(TrainConfig(optimizer=optimizer_name)).make(model, context)  # type: ignore[arg-type]
    set_learning_rate(optimizer, 1e-3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    wall, processor = list[float](), list[float]()
    for _ in range(repeats + 1):
        context.max(0)  # all begin together
        began = time.perf_counter(), time.process_time()
        optimizer.step()
        wall.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return statistics.median(wall[1:]), statistics.median(processor[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-mini")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="measure as a rank of torchrun, or alone")
    chosen = parser.parse_args()
    if chosen.here:
        torch.set_num_threads(1)
        with open_context("cpu") as context:
            for name in ("adamw", "muon"):
                wall, processor = update_seconds(context, name, chosen.model, chosen.repeats)
                if context.is_main:
                    row = [name, f"{context.world_size}", f"{wall:.3f}", f"{processor:.3f}"]
                    print(f"| {' | '.join(row)} |", flush=True)
        return
    print(
        f"{chosen.model}\n\n| update | ranks | seconds | processor seconds of rank 0 |\n|---|---|---|---|", flush=True
    )
    for ranks in RANKS:
        flags = [__file__, "--here", "--model", chosen.model, "--repeats", str(chosen.repeats)]
        subprocess.run([*python(0 if ranks == 1 else ranks), *flags], env=environment(), check=True)


if __name__ == "__main__":
    main()
