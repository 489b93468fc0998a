"""Parts that measure: speed, rows of the head, memory against what is reckoned, sampling, saving, the ladder, 1558M."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpt2_ddp.bench.ladder import Shapes, ladder, measure
from gpt2_ddp.build.micro_batch import require_fit
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.multiple_choice import Question, score
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.model.head import head_loss
from gpt2_ddp.model.memory import training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.periodic import report_saves, save
from gpt2_ddp.run import Run
from gpu.processes import isolated
from gpu.runner import Report
from gpu.scene import (
    Scene,
    compilations,
    find_scene,
    has_gpu,
    kernels,
    largest_that_fits,
    memory,
    steady,
    step,
    training,
)

ENOUGH_SECONDS = 60.0
"""A part begins no further measurement where less is left of its bound."""


def whole(run: Run) -> Run:
    """The same run with the model compiled as one."""
    return replace(run, train_model=torch.compile(run.model))


WAYS: dict[str, tuple[str, Callable[[Run], Run]]] = {
    "by block": ("on", lambda run: run),
    "whole": ("off", whole),
    "eager": ("off", lambda run: run),
}


def steady_state(report: Report) -> None:
    """30 steps at micro-batch 64, compiled by block as in training, whole, eager: speed, memory, kernels (D2, D3)."""

    def measured(way: str, size: int) -> dict[str, Any]:
        scene = find_scene()
        compiles, changed = WAYS[way]
        start = time.perf_counter()
        with training(scene, "gpt2", steps=40, micro_batch_size=size, compile=compiles, dtype=scene.half) as built:
            run = changed(built)
            step(run)
            scene.synchronize()
            first = {"s until step 1 is done": round(time.perf_counter() - start, 1)}
            found = first | steady(scene, run, scene.size(30))
            kinds, longest = kernels(scene, lambda: step(run))
            return {"row": found | {"graphs": compilations()}, "kinds": kinds, "longest": longest}

    rows = []
    for way in WAYS:
        if report.left() < ENOUGH_SECONDS:
            rows.append({"way": way, "tokens/s": "no time was left"})
            continue
        told = largest_that_fits(64 if has_gpu() else 2, lambda size, way=way: measured(way, size))
        rows.append({"way": way, "micro-batch": told["micro-batch"]} | told["row"])
        report.add("speed", rows)
        report.add(f"a step, {way}, by kind", told["kinds"])
        report.add(f"a step, {way}, longest", told["longest"])


def rows_of_the_head(report: Report) -> None:
    """The head and its loss over 4,096, 8,192, 16,384 and all positions at a time: time and peak (D6, D11)."""

    def measured(rows: int, compiled: bool) -> dict[str, Any]:
        scene = find_scene()
        config, positions = model_config(scene.model("gpt2")), scene.size(65_536, 256)
        features = torch.randn(positions, config.n_embd, device=scene.device, requires_grad=True)
        weight = (0.02 * torch.randn(config.vocab_size, config.n_embd, device=scene.device)).requires_grad_()
        targets = torch.randint(config.vocab_size, (positions,), device=scene.device)
        call = torch.compile(head_loss) if compiled else head_loss

        def once() -> None:
            with torch.autocast(scene.device.type, getattr(torch, scene.half)):
                loss = call(features, weight, targets, min(rows, positions))
            loss.backward()
            features.grad = weight.grad = None

        once()
        scene.synchronize()
        start, count = time.perf_counter(), scene.size(10, 1)
        for _ in range(count):
            once()
        scene.synchronize()
        return {"ms": round((time.perf_counter() - start) / count * 1000, 2)} | memory(scene)

    table = []
    for compiled in (False, True):
        for rows in (4096, 8192, 16_384, 65_536) if has_gpu() else (64, 256):
            row: dict[str, Any] = {"rows": rows, "compiled": compiled}
            try:
                row |= isolated(lambda rows=rows, compiled=compiled: measured(rows, compiled))
            except RuntimeError as error:
                row["ms"] = str(error)[:80]
            table.append(row)
            report.add("head", table)
    assert any(isinstance(row["ms"], float) for row in table), "none could be measured"


def memory_against_reckoned(report: Report) -> None:
    """`training_memory` beside what was allocated: three sizes, micro-batches 1, 8, 32, three ways (D2, D5)."""
    sizes, batches = (("gpt2", "gpt2-large", "gpt2-xl"), (1, 8, 32)) if has_gpu() else (("",), (2,))
    table: list[dict[str, Any]] = []
    for model in sizes:
        for way in ("eager", "checkpointing", "compiled"):
            for batch in batches:
                row: dict[str, Any] = {"model": model or "tiny", "way": way, "micro-batch": batch}
                if report.left() < ENOUGH_SECONDS:
                    row["GiB allocated"] = "no time was left"
                else:
                    try:
                        row |= isolated(lambda m=model, w=way, b=batch: measured_memory(m, w, b))
                    except RuntimeError as error:
                        row["GiB allocated"] = str(error)[:80]
                table.append(row)
                report.add("GiB", table)
    assert any("reckoned" in row for row in table), "none could be measured"


def measured_memory(model: str, way: str, batch: int) -> dict[str, Any]:
    """Two micro-steps and an update, twice; the most that was allocated, and what the arithmetic says."""
    scene = find_scene()
    checkpointing, compiled = way == "checkpointing", way == "compiled"
    fields: dict[str, Any] = {
        "compile": "on" if compiled else "off",
        "activation_checkpointing": checkpointing,
        "dtype": scene.half,
    }
    with training(scene, model, steps=2, micro_steps=2, micro_batch_size=batch, **fields) as run:
        if scene.cuda:
            torch.cuda.reset_peak_memory_stats(scene.device)
        for _ in range(2):
            step(run)
        scene.synchronize()
        reckoned = training_memory(
            run.model.config,
            micro_batch_size=batch,
            sequence_length=scene.length,
            dtype=run.precision.dtype,
            device_type=scene.device.type,
            state_bytes=8 * parameter_count(run.model.config),
            device_memory=torch.cuda.get_device_properties(scene.device).total_memory if scene.cuda else 0,
            compiled=compiled,
            activation_checkpointing=checkpointing,
        ).total
        found = memory(scene) | {"reckoned": round(reckoned / 2**30, 2)}
        if scene.cuda:
            found["reckoned / allocated"] = round(reckoned / torch.cuda.max_memory_allocated(scene.device), 3)
        return found


def automatic_micro_batch(report: Report) -> None:
    """`--micro-batch-size auto` for gpt2-large, compiled: it fits, and uses the memory (D5)."""
    scene = find_scene()
    start = time.perf_counter()
    with training(scene, "gpt2-large", steps=8, micro_batch_size="auto", compile="on", dtype=scene.half) as run:
        report.add("seconds to build", time.perf_counter() - start)
        report.add("micro-batch", run.config.micro_batch_size)
        report.add("steps", steady(scene, run, scene.size(4)))
        if scene.cuda:
            total = torch.cuda.get_device_properties(scene.device).total_memory
            report.add("share of the card reserved", torch.cuda.max_memory_reserved(scene.device) / total)


def evaluations(report: Report) -> None:
    """Sampling and HellaSwag's lengths, first and second call: whether every new length costs a plan (D10)."""
    scene = find_scene()
    model = GPT(model_config(scene.model("gpt2"))).init_weights(0).to(scene.device).eval()
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(min(50_257, model.config.vocab_size), (count,), generator=generator).tolist()

    questions = [
        Question(context=words(9 + number), endings=[words(2 + end) for end in range(4)], lengths=[2, 3, 4, 5], label=0)
        for number in range(scene.size(200, 4))
    ]
    tokens = scene.size(128, 4)
    context = DistContext(device=scene.device)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        with torch.autocast(scene.device.type, getattr(torch, scene.half)):
            work()
        scene.synchronize()
        return round(time.perf_counter() - start, 3)

    for name, work in {
        f"s for {tokens} tokens sampled": lambda: generate(model, [1, 2, 3], max_new_tokens=tokens, seed=1),
        f"s for {len(questions)} HellaSwag questions": lambda: score(model, questions, context),
    }.items():
        report.add(name, [seconds(work) for _ in range(2)])


def saving(report: Report) -> None:
    """A save of gpt2-large: for how long training is held up, and what it takes of the GPU's memory (D12)."""
    scene = find_scene()
    with training(scene, "gpt2-large", steps=3, dtype=scene.half, compile="off", micro_batch_size=1) as run:
        step(run)
        scene.synchronize()
        before = 0
        if scene.cuda:
            torch.cuda.reset_peak_memory_stats(scene.device)
            before = torch.cuda.memory_allocated(scene.device)
        save(run)
        if scene.cuda:
            extra = torch.cuda.max_memory_allocated(scene.device) - before
            report.add("GiB of the GPU while saving", round(extra / 2**30, 3))
        saved = run.writer.reports(wait=True)
        report.add("saves", [vars(each) for each in saved])
        report_saves(run, wait=True)
    assert len(saved) == 1, saved
    assert saved[0].error is None, saved[0].error


def speed_ladder(report: Report) -> None:
    """The ladder of `python -m gpt2_ddp.bench` at micro-batch 16 and 65,536 tokens a step (D14)."""
    on_gpu = has_gpu()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    rungs = ladder(device) if on_gpu else [ladder(device)[0], ladder(device)[3]]
    rows: list[dict[str, Any]] = []

    def measured(name: str, steps: int) -> dict[str, Any]:
        scene = find_scene()
        shapes = Shapes(
            model="gpt2" if scene.cuda else "gpt2-nano",  # the ladder wants GPT-2's vocabulary
            sequence_length=scene.length,
            micro_batch_size=scene.size(16, 1),
            total_batch_size=scene.size(65_536, 32),
            steps=scene.size(steps, 1),
        )
        chosen = next(rung for rung in ladder(scene.device) if rung.name == name)
        return vars(measure(shapes, chosen, DistContext(device=scene.device))[1])

    for rung in rungs:
        if report.left() < ENOUGH_SECONDS:
            rows.append({"name": rung.name, "ms_per_step": "no time was left"})
        else:
            slow = any(row.get("ms_per_step", 0) > 2000 for row in rows[-1:])
            try:
                rows.append(isolated(lambda name=rung.name, steps=3 if slow else 20: measured(name, steps)))
            except RuntimeError as error:
                rows.append({"name": rung.name, "ms_per_step": str(error)[:80]})
        report.add("rungs", rows)
    assert any(isinstance(row["ms_per_step"], float) for row in rows), "none could be measured"


def largest_model(report: Report) -> None:
    """1558M: `--shard` where it is built; else whether one GPU holds it, and its speed with what is there."""
    report.add("--shard", "built: measure it by hand" if hasattr(TrainConfig, "shard") else "not built yet")

    def fits() -> str:
        scene = find_scene()
        try:
            shape = model_config(scene.model("gpt2-xl"))
            require_fit(shape, 8 * parameter_count(shape), scene.device)
        except ValueError as error:
            return str(error)
        return ""

    refused = isolated(fits)
    report.add("require_fit", refused or "fits")
    if refused:
        return

    def measured(checkpointing: bool) -> dict[str, Any]:
        scene: Scene = find_scene()
        fields: dict[str, Any] = {"micro_batch_size": "auto", "activation_checkpointing": checkpointing}
        with training(scene, "gpt2-xl", steps=8, compile="off", dtype=scene.half, **fields) as run:
            return {"micro-batch": run.config.micro_batch_size} | steady(scene, run, scene.size(3))

    rows: list[dict[str, Any]] = []
    for checkpointing in (False, True):
        try:
            row = isolated(lambda again=checkpointing: measured(again))
        except RuntimeError as error:
            row = {"tokens/s": str(error)[:120]}
        rows.append({"checkpointing": checkpointing} | row)
        report.add("eager, micro-batch auto", rows)
