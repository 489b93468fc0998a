"""What a first user on a T4, an A100 or a later GPU would meet. Skipped where there is no CUDA GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from running import checkpoint, copy_until, final_hashes, metrics, python, run, train, train_command
from safetensors.torch import load_file

from gpt2_ddp.checkpoint.state import weights_and_moments
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.loader import TrainData
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.windows import Windows
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.evaluation.validation import validation_loss
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.optim.rule import AdamW
from gpt2_ddp.optim.updates import apply_update
from gpt2_ddp.system.hardware import found_hardware, peak_flops
from gpt2_ddp.system.precision import choose_dtype

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
CAPABILITY = torch.cuda.get_device_capability(0) if GPUS else (0, 0)
CUDA = torch.device("cuda", 0)
CleanRun = Callable[..., Path]

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not GPUS, reason="needs a CUDA GPU")]
native_bfloat16 = pytest.mark.skipif(CAPABILITY < (8, 0), reason="needs compute capability 8.0")
several_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")


def losses(out_dir: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(out_dir)]


def hashes(out_dir: Path) -> list[str]:
    return [entry["data_hash"] for entry in metrics(out_dir)]


def trainer_state(out_dir: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint(out_dir) / "trainer_state.json").read_text()))


def assert_near_the_cpu(out_dir: Path, clean_run: CleanRun, *, tolerance: float) -> None:
    """The same data, and losses near those of a float32 run on the CPU."""
    clean = clean_run()
    assert hashes(out_dir) == hashes(clean)
    assert losses(out_dir) == pytest.approx(losses(clean), abs=tolerance)
    assert metrics(out_dir)[-1]["skipped"] == 0


def test_everything_auto_is_right_for_this_gpu(clean_run: CleanRun) -> None:
    out_dir = clean_run("--device=auto", "--dtype=auto", "--compile=auto")
    [start] = json.loads((out_dir / "config.json").read_text())["starts"]
    expected = torch.bfloat16 if CAPABILITY >= (8, 0) else torch.float16 if CAPABILITY >= (7, 0) else torch.float32
    assert start["dtype"] == str(expected)
    assert start["device"] == "cuda:0"
    assert start["device_name"] == torch.cuda.get_device_name(0)
    assert "emulates" not in (out_dir / "stdout").read_text()
    assert_near_the_cpu(out_dir, clean_run, tolerance=0.05)


def test_float32_is_near_the_cpu(clean_run: CleanRun) -> None:
    out_dir = clean_run("--device=cuda")
    assert_near_the_cpu(out_dir, clean_run, tolerance=0.02)  # TF32 where there is TF32
    assert losses(out_dir)[0] == pytest.approx(losses(clean_run())[0], abs=2e-3)


@native_bfloat16
def test_bfloat16_trains_without_a_scaler(clean_run: CleanRun) -> None:
    out_dir = clean_run("--device=cuda", "--dtype=bfloat16")
    assert_near_the_cpu(out_dir, clean_run, tolerance=0.05)
    assert trainer_state(out_dir)["scaler"] == {}


@pytest.mark.skipif(CAPABILITY >= (8, 0), reason="this GPU has bfloat16")
def test_bfloat16_is_obeyed_with_a_warning(data_dir: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "run", data_dir, "--device=cuda", "--dtype=bfloat16", "--max-steps=2")
    assert "only emulates bfloat16; --dtype float" in done.stdout + done.stderr


def test_float16_trains_and_resumes_with_its_scale(clean_run: CleanRun, data_dir: Path, tmp_path: Path) -> None:
    flags = ["--device=cuda", "--dtype=float16"]
    clean = clean_run(*flags)
    assert_near_the_cpu(clean, clean_run, tolerance=0.05)
    out_dir = copy_until(clean, tmp_path / "run", 10)
    train(out_dir, data_dir, *flags)
    assert_near_the_cpu(out_dir, clean_run, tolerance=0.05)
    scaler = trainer_state(out_dir)["scaler"]
    assert scaler == trainer_state(clean)["scaler"]
    assert scaler["scale"] == 65536.0
    assert scaler["_growth_tracker"] == 20  # 10 where the state was not taken up


def test_resume_to_the_bit_where_that_is_promised(clean_run: CleanRun, data_dir: Path, tmp_path: Path) -> None:
    flags = ["--device=cuda", "--dtype=auto", "--reproducible", "--dropout=0.1"]
    clean = clean_run(*flags)
    out_dir = copy_until(clean, tmp_path / "run", 10)
    train(out_dir, data_dir, *flags)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert losses(out_dir) == losses(clean)


def test_compiled_beside_evaluation_sampling_and_saving(clean_run: CleanRun, data_dir: Path, tmp_path: Path) -> None:
    watching = ["--val-every=5", "--val-tokens=160", "--sample-every=10"]
    done = train(tmp_path / "run", data_dir, "--device=cuda", "--compile=on", *watching)
    if "torch.compile failed" in done.stderr:
        pytest.skip(f"no working compiler on this machine: {done.stderr}")
    assert_near_the_cpu(tmp_path / "run", clean_run, tolerance=0.02)
    saved = load_file(checkpoint(tmp_path / "run") / "model.safetensors")
    assert saved.keys() == load_file(checkpoint(clean_run()) / "model.safetensors").keys()
    assert [entry["step"] for entry in metrics(tmp_path / "run", "val")] == [5, 10, 15, 20]
    load_model(checkpoint(tmp_path / "run"))


def test_compiled_with_checkpointing_is_the_same_run(data_dir: Path, tmp_path: Path, clean_run: CleanRun) -> None:
    done = train(tmp_path / "run", data_dir, "--device=cuda", "--compile=on", "--activation-checkpointing")
    if "torch.compile failed" in done.stderr:
        pytest.skip(f"no working compiler on this machine: {done.stderr}")
    assert_near_the_cpu(tmp_path / "run", clean_run, tolerance=0.02)


def test_memory_and_mfu_are_logged(clean_run: CleanRun) -> None:
    out_dir = clean_run("--device=cuda", "--dtype=auto", "--compile=off")
    hardware = found_hardware(CUDA)
    known = peak_flops(hardware, choose_dtype("auto", hardware)[0])
    for entry in metrics(out_dir):
        assert 10 < entry["memory_mb"] < torch.cuda.get_device_properties(0).total_memory / 2**20
        assert (entry["mfu"] is not None) == (known is not None)
        if known:
            assert 0 <= entry["mfu"] < 1
            per_token = model_config("gpt2-nano").flops_per_token(16)
            assert entry["mfu"] == pytest.approx(per_token * entry["tokens_per_sec"] / known, abs=1e-4)


def test_the_largest_micro_batch_is_found(clean_run: CleanRun) -> None:
    out_dir = clean_run("--device=cuda", "--micro-batch-size=auto")
    assert_near_the_cpu(out_dir, clean_run, tolerance=0.02)
    assert trainer_state(out_dir)["batch"]["micro_batch_size"] == 8  # all of a step's sequences


def test_one_rank_under_torchrun(clean_run: CleanRun) -> None:
    assert_near_the_cpu(clean_run("--device=cuda", nproc=1), clean_run, tolerance=0.02)


@several_gpus
def test_as_many_ranks_as_gpus(clean_run: CleanRun, data_dir: Path, tmp_path: Path) -> None:
    ranks = 4 if GPUS >= 4 else 2
    clean = clean_run("--device=cuda", nproc=ranks)
    assert_near_the_cpu(clean, clean_run, tolerance=0.02)
    out_dir = copy_until(clean, tmp_path / "run", 10)
    train(out_dir, data_dir, "--device=cuda")  # goes on with one
    assert hashes(out_dir) == hashes(clean)
    assert losses(out_dir) == pytest.approx(losses(clean), abs=0.02)


BOTH_BACKENDS = """
import torch, torch.distributed as dist
from gpt2_ddp.distributed.context import open_context
with open_context("auto") as context:
    assert context.device == torch.device("cuda", context.local_rank)
    on_gpu = context.sum(torch.ones(3, device=context.device))
    assert on_gpu.tolist() == [2.0, 2.0, 2.0] and on_gpu.is_cuda
    on_cpu = context.sum(torch.ones(3))
    assert on_cpu.tolist() == [2.0, 2.0, 2.0] and not on_cpu.is_cuda
    assert context.max(context.rank) == 1
    told = 5.0 - context.rank
    tensors = {"w": torch.full((2, 2), told, device=context.device), "step": torch.tensor(told)}
    context.broadcast_tensors(tensors)
    assert tensors["w"].is_cuda and tensors["w"].tolist() == [[5.0, 5.0], [5.0, 5.0]] and tensors["step"] == 5
assert not dist.is_initialized()
print("through")
"""


@several_gpus
def test_nccl_carries_gpu_tensors_and_gloo_the_others(tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(BOTH_BACKENDS)
    done = run([*python(2), str(tmp_path / "both.py")])
    assert done.stdout.split() == ["through", "through"], done.stderr


def test_more_ranks_than_gpus_are_refused(data_dir: Path, tmp_path: Path) -> None:
    ranks = 2 if GPUS == 1 else 2 * GPUS
    done = run(train_command(tmp_path / "run", data_dir, "--device=auto", "--micro-batch-size=1", nproc=ranks))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr
    assert f"which has {GPUS} GPUs: start {GPUS} with --nproc_per_node={GPUS}" in told[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_fused_update_leaves_out_a_bad_gradient(scaled: bool, bad: float) -> None:
    model = GPT(model_config("gpt2-nano")).init_weights(0).to(CUDA)
    optimizer = AdamW(weight_decay=0.1, beta1=0.9, beta2=0.95).make(model, DistContext(device=CUDA))
    scaler = torch.amp.GradScaler("cuda", enabled=scaled, init_scale=1024.0)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2

    def update(spoiled: bool) -> bool:
        scaler.scale(torch.ones((), device=CUDA))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if spoiled:
            model.ln_f.weight.grad[0] = bad
        return bool(apply_update(optimizer, scaler, loss=torch.ones((), device=CUDA), grad_clip=1.0)[1])

    def state() -> dict[str, torch.Tensor]:
        found = weights_and_moments(model, optimizer)
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    assert optimizer.defaults["fused"]
    assert not update(spoiled=False)
    before = state()
    assert update(spoiled=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state().items())
    assert scaler.get_scale() == (512.0 if scaled else 1.0)
    assert not update(spoiled=False)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in state().items())


def test_pinned_batches_are_the_same(data_dir: Path) -> None:
    windows = Windows(find_shards(data_dir, "train"), 16)
    plan = BatchPlan(micro_batch_size=2, sequence_length=16, total_batch_size=128)
    batches = []
    for device in (CUDA, torch.device("cpu")):
        with closing(TrainData(windows, plan, rank=0, seed=1, device=device, first_step=3)) as data:
            batches.append(data.next())
    pinned, plain = batches
    assert pinned.tokens.is_pinned()
    assert not plain.tokens.is_pinned()
    for (ids, targets), tokens in zip(pinned.micro_batches(CUDA), plain.tokens, strict=True):
        assert ids.is_cuda
        assert torch.equal(ids.cpu(), tokens[:, :-1])
        assert torch.equal(targets.cpu(), tokens[:, 1:])


def test_evaluation_and_sampling_change_nothing(clean_run: CleanRun) -> None:
    model = load_model(checkpoint(clean_run())).to(CUDA).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(64).view(2, 32)
    context = DistContext(device=CUDA)
    random_state = torch.cuda.get_rng_state(CUDA), torch.get_rng_state()
    found = [validation_loss(model, [(ids, ids)], context, nullcontext()) for _ in range(2)]
    samples = [generate(model, [1, 2, 3], max_new_tokens=8, top_k=50, seed=7) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(*samples)
    assert model.training
    assert torch.equal(torch.cuda.get_rng_state(CUDA), random_state[0])
    assert torch.equal(torch.get_rng_state(), random_state[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    on_cpu = load_model(checkpoint(clean_run()))
    expected = validation_loss(on_cpu, [(ids, ids)], DistContext(), nullcontext()).val_loss
    assert found[0].val_loss == pytest.approx(expected, abs=5e-3)


def test_a_sample_never_waits_for_a_plan_of_cudnn(clean_run: CleanRun) -> None:
    model = load_model(checkpoint(clean_run())).to(CUDA)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(model, [1, 2, 3], max_new_tokens=4, autocast=torch.autocast("cuda", dtype=torch.float16))
    names = {event.name for event in profile.events() if "scaled_dot_product" in event.name}
    assert names
    assert not [name for name in names if "cudnn" in name]
