"""What the parts share: the sizes for this machine, a run of the trainer, its steps, their time, memory and kernels."""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_ddp.build import build_run
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.distributed.context import open_context
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.model.gpt import SIZES, GPTConfig
from gpt2_ddp.periodic import StepResult
from gpt2_ddp.run import Run
from gpt2_ddp.system.hardware import Hardware, found_hardware
from gpt2_ddp.system.precision import choose_dtype
from gpt2_ddp.train import train_step

KINDS = (
    ("NCCL", r"nccl"),
    ("attention", r"flash|fmha|sdp|scaled_dot|attention|cudnn.*mha"),
    ("matrix products", r"gemm|cutlass|xmma|nvjet|cublas|wgmma|(aten::|^)(mm|bmm|addmm)\b"),
    ("Triton", r"triton"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("copies", r"memcpy|memset|copy|cat\b|CatArray|fill|clone|_to\b"),
    ("reductions", r"reduce|softmax|norm|sum\b"),
    ("elementwise", r"elementwise|vectorized|unrolled|(aten::|^)(add|mul|div|sub|exp|gelu|tanh)"),
)
"""Kinds of kernels by a pattern in their names, the first that matches."""
GPUS = "GPU_KIT_GPUS"
"""Environment variable: how many GPUs there are."""
TINY = GPTConfig(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=16)
"""The model of the wiring: its steps take milliseconds. The random tokens are all of its vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The device and the sizes: those of the question on a GPU, tiny ones where only the wiring is shown."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def hardware(self) -> Hardware:
        return found_hardware(self.device)

    @property
    def half(self) -> str:
        """The two-byte format that `--dtype auto` takes on a GPU like this."""
        dtype = choose_dtype("auto", self.hardware)[0] if self.cuda else torch.bfloat16
        return str(dtype).removeprefix("torch.")

    @property
    def length(self) -> int:
        return 1024 if self.cuda else 32

    def model(self, name: str) -> str:
        return name if self.cuda else "gpt2-tiny"

    def size(self, on_gpu: int, tiny: int = 2) -> int:
        return on_gpu if self.cuda else tiny

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def has_gpu() -> bool:
    """As `python -m gpu` found it out: a part that forks further must not ask CUDA itself."""
    return os.environ.get(GPUS, "0") != "0"


def find_scene() -> Scene:
    """Where the part computes. On a CPU `torch.compile` only traces: Inductor's C++ would take a minute each time."""
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        return Scene(device=torch.device("cuda", 0))
    SIZES["gpt2-tiny"] = TINY
    if not isinstance(torch.compile, functools.partial):
        torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    return Scene(device=torch.device("cpu"))


def warm_up_wiring() -> None:
    """On a CPU: import and set up once, before parts are forked, what each of them would import for its first graph."""
    find_scene()
    torch.compile(lambda x: x + 1)(torch.ones(1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@contextmanager
def training(scene: Scene, model: str, *, steps: int, micro_steps: int = 1, **fields: Any) -> Iterator[Run]:
    """A run of the trainer over random tokens, ready for its first step."""
    size = fields.pop("micro_batch_size", scene.size(8))
    sequences = fields.pop("sequences", size if size != "auto" else scene.size(64, 4)) * micro_steps
    tokens = sequences * scene.length
    with tempfile.TemporaryDirectory(prefix="gpu_kit_") as folder, ExitStack() as held:
        generator = np.random.default_rng(0)
        data = Path(folder) / "data"
        data.mkdir()
        write_shard(
            data / "train_000000.bin", (generator.random(2 * tokens + 1) ** 3 * TINY.vocab_size).astype(np.uint16)
        )
        config = TrainConfig(
            model=scene.model(model),
            data_dir=data,
            out_dir=Path(folder) / "run",
            sequence_length=scene.length,
            micro_batch_size=size,
            total_batch_size=tokens,
            max_steps=steps,
            warmup_steps=5,
            val_every=0,
            check_ranks_every=0,
            device="cuda" if scene.cuda else "cpu",
            **fields,
        )
        context = held.enter_context(open_context(config.device))
        run = build_run(config, context, StopRequest(config.out_dir), held)
        try:
            yield run
        finally:
            run.close()


def step(run: Run) -> StepResult:
    """The run's next step, by the trainer's own code; the host does not wait for it."""
    result = train_step(run, run.data.next())
    run.state.step += 1
    return result


def steady(scene: Scene, run: Run, steps: int) -> dict[str, Any]:
    """Three steps to warm up, then `steps` that are timed: tokens/s, and the memory that they took at most."""
    for _ in range(3):
        step(run)
    scene.synchronize()
    if scene.cuda:
        torch.cuda.reset_peak_memory_stats(scene.device)
    start = time.perf_counter()
    for _ in range(steps):
        result = step(run)
    scene.synchronize()
    seconds = (time.perf_counter() - start) / steps
    rate = run.config.total_batch_size / seconds
    return {"ms a step": round(1000 * seconds, 2), "tokens/s": round(rate), "loss": float(result.loss)} | memory(scene)


def memory(scene: Scene) -> dict[str, float]:
    """The peaks since the last reset, in GiB; nothing on a CPU."""
    if not scene.cuda:
        return {}
    peaks = torch.cuda.max_memory_allocated(scene.device), torch.cuda.max_memory_reserved(scene.device)
    return dict(zip(("GiB allocated", "GiB reserved"), (round(peak / 2**30, 2) for peak in peaks), strict=True))


def kernels(scene: Scene, work: Callable[[], object], most: int = 12) -> tuple[list[dict[str, Any]], list[Any]]:
    """Milliseconds that `work` spends by kind of kernel, and in the longest kernels (operators on a CPU)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if scene.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        scene.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    rows = [
        (event.key, event.self_device_time_total if scene.cuda else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
        if (event.device_type == on_gpu) == scene.cuda and not getattr(event, "is_user_annotation", False)
    ]
    by_kind: dict[str, list[float]] = {}
    for name, microseconds, count in rows:
        total = by_kind.setdefault(kind_of(name), [0.0, 0])
        total[0] += microseconds / 1000
        total[1] += count
    kinds = [
        {"kind": kind, "ms": round(ms, 3), "calls": int(count)}
        for kind, (ms, count) in sorted(by_kind.items(), key=lambda item: -item[1][0])
    ]
    longest = [
        {"kernel": name[:90], "kind": kind_of(name), "ms": round(us / 1000, 3), "calls": count}
        for name, us, count in sorted(rows, key=lambda row: -row[1])[:most]
    ]
    return kinds, longest


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def compilations() -> int:
    """Graphs that `torch.compile` has compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def largest_that_fits(size: int, measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """`measure` at `size` or, where memory runs out, at half of it, and so on: each size in a process of its own."""
    from gpu.processes import isolated

    while True:
        try:
            return {"micro-batch": size} | isolated(lambda size=size: measure(size))
        except RuntimeError as error:
            no_memory = "OutOfMemoryError" in str(error) or "does not fit into the GPU's memory" in str(error)
            if not no_memory or size == 1:
                raise
            size //= 2
