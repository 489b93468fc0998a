"""What a measurement of the gradient noise scale costs beside a training step: `python -m drivers.noise_cost` in tests.

CPU time, since other processes make the time on the clock longer; of `gpt2-mini`, steps and measurements in turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from running import write_shards

from gpt2_ddp import train
from gpt2_ddp.build import build_run
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import open_context
from gpt2_ddp.distributed.stopping import StopRequest

ROUNDS = 5


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, open_context("cpu") as context, ExitStack() as held:
        config = TrainConfig(
            model="gpt2-mini",
            device="cpu",
            dtype="float32",
            compile="off",
            sequence_length=256,
            total_batch_size=4096,
            val_every=0,
            noise_scale_every=1,
            data_dir=write_shards(Path(folder) / "data", train_tokens=(100_000,)),
            out_dir=Path(folder) / "run",
        )
        run = build_run(config, context, StopRequest(config.out_dir), held)
        [measurement] = run.evaluations
        ratios = []
        for step in range(ROUNDS + 1):
            batch = run.data.next()
            stepped = cpu_seconds(lambda batch=batch: train.train_step(run, batch))
            measured = cpu_seconds(
                lambda step=step: measurement.run(run.model, context, run.precision.autocast(), step=step)
            )
            print(f"step {stepped:.2f} s, measurement {measured:.2f} s of CPU time", flush=True)
            ratios.append(measured / stepped)
        run.close()
    print(f"a measurement costs {statistics.median(ratios[1:]):.2f} steps in the median of {ROUNDS} rounds")


if __name__ == "__main__":
    main()
