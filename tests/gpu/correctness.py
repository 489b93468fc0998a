"""Parts that have a right answer: attention, the test file, recompilations, waiting, bits, DDP, float16."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2_ddp.build.making import make_reduction, wrapped_and_warm
from gpt2_ddp.distributed.wrapping import release
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.model.head import head_loss
from gpt2_ddp.run import Run
from gpu.processes import isolated
from gpu.runner import Report, SkippedPartError
from gpu.scene import Scene, compilations, find_scene, has_gpu, kernels, memory, step, training

TESTS = Path(__file__).resolve().parent.parent


def versions_and_attention(report: Report) -> None:
    """What is here, and which kernel attention takes for the model's q, k, v, with what copies (D4, D10)."""
    scene = find_scene()
    report.add("cuDNN", torch.backends.cudnn.version() if scene.cuda else None)
    report.add("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if scene.cuda else None)
    report.add("compiled for", torch.cuda.get_arch_list())
    report.add("capability", scene.hardware.capability)
    try:
        import triton

        report.add("triton", triton.__version__)
    except ImportError:
        report.add("triton", "not here: torch.compile will fail on a GPU")
    priority = getattr(torch._C, "_get_sdp_priority_order", list)()
    backends = torch.nn.attention.SDPBackend.__members__
    names = {int(backend): name for name, backend in backends.items()}
    report.add("order of attention back ends", [names.get(int(number), number) for number in priority])
    config = model_config(scene.model("gpt2"))
    attention = GPT(config).init_weights(0).h[0].attn.to(scene.device)
    shape = (scene.size(16), scene.length, config.n_embd)
    x = torch.randn(shape, device=scene.device, requires_grad=True)
    autocast = torch.autocast(scene.device.type, getattr(torch, scene.half))

    def forward_and_backward() -> None:
        with autocast:
            y = attention(x.to(getattr(torch, scene.half)))
        y.float().sum().backward()

    forward_and_backward()  # what the first call sets up is not looked at
    kinds, longest = kernels(scene, forward_and_backward)
    report.add("attention by kind, forward and backward", kinds)
    report.add("its kernels", longest)


def cuda_tests(report: Report) -> None:
    """tests/end_to_end/test_cuda.py: what a first user on this GPU would meet."""
    try:
        import pytest  # no part of an installation without the extra [test]
    except ImportError:
        raise SkippedPartError("pytest is not here: pip install pytest") from None
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        os.chdir(TESTS.parent)
        options = ["-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}", f"--junitxml={junit}"]
        pytest.main([*options, f"--basetemp={folder}/tests", str(TESTS / "end_to_end" / "test_cuda.py")])
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    report.add("passed", len(cases) - len(skipped) - len(failed))
    report.add("skipped", sorted({f"{case.get('name')}: {case.find('skipped').get('message')}" for case in skipped}))  # type: ignore[union-attr]
    report.add("failed", [case.get("name") for case in failed])
    if cases and len(skipped) == len(cases):
        raise SkippedPartError(f"all {len(cases)} tests want a CUDA GPU")
    assert not failed, report.found["failed"]
    assert cases, "no test was collected"


def recompilations(report: Report) -> None:
    """Six steps of the compiled trainer: nothing is compiled after the warm-up (D3)."""
    scene = find_scene()
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    start = time.perf_counter()
    with training(scene, "gpt2", steps=6, micro_batch_size=scene.size(32), compile="on", dtype=scene.half) as run:
        report.add("seconds until the first step", time.perf_counter() - start)
        warm = compilations()
        report.add("graphs after the warm-up", warm)
        losses = [float(step(run).loss) for _ in range(6)]
        report.add("losses", losses)
        report.add("graphs after six steps", compilations())
        report.add("graph breaks", dict(torch._dynamo.utils.counters["graph_break"]))
    assert warm, "nothing was compiled: see the log for why"
    assert compilations() == warm, "the steps were compiled again after the warm-up: see the log for why"


def waiting(report: Report) -> None:
    """A warm step in which every wait for the device is an error: bfloat16, and float16 with its scaler."""
    scene = find_scene()
    for dtype in {"bfloat16": (8, 0), "float16": (7, 0)} if scene.cuda else ("bfloat16", "float16"):
        with training(scene, "gpt2", steps=5, dtype=dtype, compile="off") as run:
            for _ in range(3):
                step(run)
            scene.synchronize()
            try:
                if scene.cuda:
                    torch.cuda.set_sync_debug_mode("error")
                step(run)
                report.add(dtype, "no wait" if scene.cuda else "a step was made; only CUDA tells of waits")
            except RuntimeError as error:
                report.add(dtype, str(error))
                raise
            finally:
                if scene.cuda:
                    torch.cuda.set_sync_debug_mode("default")


def reproducible(report: Report) -> None:
    """`--reproducible` with `--micro-batch-size auto` (D1); compiled twice, with empty compiler caches: equal bits."""

    def automatic() -> dict[str, Any]:
        scene = find_scene()
        with training(scene, "gpt2", steps=2, micro_batch_size="auto", reproducible=True, dtype=scene.half) as run:
            losses = [float(step(run).loss) for _ in range(2)]
            return {"micro-batch": run.config.micro_batch_size, "losses": losses}

    def hashed() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            os.environ["TRITON_CACHE_DIR"] = f"{cache}/triton"
            scene = find_scene()
            fields: dict[str, Any] = {"reproducible": True, "compile": "on", "dtype": scene.half, "micro_steps": 2}
            with training(scene, "gpt2", steps=4, **fields) as run:
                losses = [float(step(run).loss) for _ in range(4)]
                digest = hashlib.sha256()
                for parameter in run.model.parameters():
                    digest.update(parameter.detach().cpu().numpy().tobytes())
                return {"weights": digest.hexdigest(), "losses": losses, "graphs": compilations()}

    report.add("automatic micro-batch", isolated(automatic))
    first, second = (isolated(hashed) for _ in range(2))
    report.add("compiled, twice", [first, second])
    assert first["weights"] == second["weights"], "two compilations gave different bits"


@contextmanager
def group_of_one(scene: Scene) -> Iterator[None]:
    """A process group of one rank: NCCL for what lies on the GPU, gloo for the rest."""
    backend, bound = ("cpu:gloo,cuda:nccl", scene.device) if scene.cuda else ("gloo", None)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    try:
        yield
    finally:
        dist.destroy_process_group()


def under_ddp(run: Run) -> Run:
    """The same run under DDP, made and warmed up by the trainer's own code, which does so for several ranks alone."""
    several = replace(run.context, world_size=2)
    wrapped = wrapped_and_warm(run.train_model, several, run.plan, run.precision)
    several.shorten_timeouts(60)
    reduction = make_reduction(wrapped, run.context, run.plan, reproducible=False)
    return replace(run, train_model=wrapped, reduction=reduction)


def forced_ddp(report: Report) -> None:
    """DDP over NCCL in a group of one rank: gradients stay views of its buckets, its memory, its end (D2, D16)."""

    def measured(ddp: bool, compile: str) -> dict[str, Any]:
        scene = find_scene()
        with group_of_one(scene):
            with training(scene, "gpt2", steps=4, micro_steps=2, dtype=scene.half, compile=compile) as built:
                run = under_ddp(built) if ddp else built
                if scene.cuda:
                    torch.cuda.reset_peak_memory_stats(scene.device)
                losses = [float(step(run).loss) for _ in range(4)]
                grads = [p.grad for p in run.model.parameters() if p.grad is not None]
                found = {"model": type(run.train_model).__name__, "compile": compile, "gradients": len(grads)}
                found["storages of gradients"] = len({grad.untyped_storage().data_ptr() for grad in grads})
                found |= {"losses": losses} | memory(scene)
                release(run.train_model)
            closing = time.perf_counter()
        return found | {"s to end the group": round(time.perf_counter() - closing, 3)}

    rows: list[dict[str, Any]] = []
    for ddp, compile in ((False, "off"), (True, "off"), (True, "on")):
        rows.append(isolated(lambda ddp=ddp, compile=compile: measured(ddp, compile)))
        report.add("without and with DDP", rows)
    for row in rows[1:]:
        assert row["model"] == "DistributedDataParallel"
        assert row["storages of gradients"] < row["gradients"], "gradients are not views of DDP's buckets"
        assert all(map(partial(math.isclose, abs_tol=0.05), row["losses"], rows[0]["losses"]))


def half_precision(report: Report) -> None:
    """float16 against bfloat16 for 50 steps; and the head's float16 gradient with one dominant target (D6)."""

    def trained(dtype: str) -> dict[str, Any]:
        scene = find_scene()
        steps = scene.size(50, 6)
        with training(scene, "gpt2", steps=steps, dtype=dtype, compile="off") as run:
            losses = [float(step(run).loss) for _ in range(steps)]
            scale = run.precision.scaler.get_scale() if dtype == "float16" else None
            skipped = run.state.skips.total()
            return {"dtype": dtype, "losses": losses[:: max(1, steps // 10)], "skipped": skipped, "scale": scale}

    runs = [isolated(lambda dtype=dtype: trained(dtype)) for dtype in ("bfloat16", "float16", "float32")]
    report.add("50 steps", runs)
    head = isolated(dominant_target)
    report.add("head's gradient, one target", head)
    assert all(abs(run["losses"][-1] - runs[2]["losses"][-1]) < 0.2 for run in runs), "the formats train differently"
    if has_gpu():
        assert all(row["finite"] for row in head), "a float16 sum of gradients overflowed"


def dominant_target() -> list[dict[str, Any]]:
    """The head's weight gradient where every position has the same target and one feature is large."""
    scene = find_scene()
    config, rows = model_config(scene.model("gpt2")), scene.size(16_384, 1024)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, config.n_embd, generator=generator)
    features[:, 0] = 200.0  # 1,024 of these, summed, are past float16's 65,504
    features = features.to(scene.device)
    weight = (0.02 * torch.randn(config.vocab_size, config.n_embd, generator=generator)).to(scene.device)
    targets = torch.full((rows,), 7, device=scene.device)
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        leaf = weight.clone().requires_grad_()
        with torch.autocast(scene.device.type, dtype) if dtype != torch.float32 else nullcontext():
            loss = head_loss(features, leaf, targets)
        loss.backward()
        gradients[dtype] = leaf.grad
    exact = gradients[torch.float32]
    return [
        {
            "dtype": str(dtype),
            "finite": bool(gradient.isfinite().all()),
            "relative error": float((gradient - exact).norm() / exact.norm()),
        }
        for dtype, gradient in gradients.items()
    ]
