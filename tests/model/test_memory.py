"""Memory: the arithmetic against what PyTorch keeps and what the process holds; the search for a micro-batch."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import running
import torch
import torch.distributed as dist
from drivers import footprint
from running import ROOT, environment
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gpt2_ddp.build.config_file import values_of
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.reduction import DDPReduction
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT, SIZES, GPTConfig
from gpt2_ddp.model.head import PRODUCT_ROWS, add_product, head_loss
from gpt2_ddp.model.memory import USABLE, TrainingMemory, training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim.updates import zero_gradients
from gpt2_ddp.system.hardware import found_hardware
from gpt2_ddp.system.precision import Precision

WIDE = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=512)


def reckon(
    config: GPTConfig, size: int, length: int, dtype: torch.dtype, device_type: str = "cpu", **more: Any
) -> TrainingMemory:
    return training_memory(
        config,
        micro_batch_size=size,
        sequence_length=length,
        dtype=dtype,
        device_type=device_type,
        state_bytes=8 * parameter_count(config),
        **more,
    )


@pytest.mark.parametrize(("name", "published"), [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_parameters_are_as_many_as_published(name: str, published: int) -> None:
    assert parameter_count(SIZES[name]) - 47 * SIZES[name].n_embd == published  # the padding


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_forward_pass_leaves_behind(dtype: torch.dtype, checkpointing: bool) -> None:
    model = GPT(WIDE).init_weights(0)
    model.activation_checkpointing = checkpointing
    ids = torch.zeros(4, 128, dtype=torch.int64)
    autocast = Precision.of(dtype, torch.device("cpu")).autocast
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, autocast():
        features = model.features(ids)
    kept = sum(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    last_norm = 2 * features.nbytes  # its input and its output
    lowered = 0 if checkpointing or dtype == torch.float32 else 2 * 12 * WIDE.n_layer * WIDE.n_embd**2
    reckoned = training_memory(
        WIDE,
        micro_batch_size=4,
        sequence_length=128,
        dtype=dtype,
        device_type="cpu",
        state_bytes=8 * parameter_count(WIDE),
        activation_checkpointing=checkpointing,
    )
    assert reckoned.activations == pytest.approx(kept - last_norm - lowered, rel=0.08)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_backward_pass_computes_no_matmul_again_that_it_is_not_asked_to(
    dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linear layers with a bias are `addmm`, in the forward pass only; the backward pass has `mm`."""
    config = replace(WIDE, n_layer=2)
    model = GPT(config).init_weights(0)
    model.activation_checkpointing = checkpointing
    backend = functools.partial(
        torch.compile, backend="aot_eager_decomp_partition"
    )  # Inductor's choice of what is kept
    monkeypatch.setattr("torch.compile", backend)
    compiled = CompiledGPT(model)
    ids = torch.zeros(4, 128, dtype=torch.int64)
    autocast = Precision.of(dtype, torch.device("cpu")).autocast
    with autocast():
        compiled(ids, ids).backward()
        loss = compiled(ids, ids)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss.backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::mm"] >= 8 * config.n_layer
    assert counts.get("aten::addmm", 0) // config.n_layer == (3 if checkpointing else 0)


def product_flops(_: list[int], left: list[int], right: list[int], **_more: object) -> int:
    """Of `addmm_`, by the shapes, which PyTorch counts for `addmm` only."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("n_layer", [1, 3])
def test_flops_per_token_are_those_that_a_counted_step_spends(n_layer: int) -> None:
    config = GPTConfig(block_size=32, vocab_size=128, n_layer=n_layer, n_head=2, n_embd=64)
    model = GPT(config).init_weights(0)
    ids = torch.zeros(3, 24, dtype=torch.int64)
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops})
    with counting as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == config.flops_per_token(24) * ids.numel()


class Step(nn.Module):
    """A forward and a backward pass, so that both have the parameters that it is called with."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> None:
        self.model(ids, ids).backward()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_flops_are_those_of_a_counted_step_of_every_size(name: str) -> None:
    step = Step(GPT(SIZES[name]))
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops})
    with FakeTensorMode() as fake, counting as counter, sdpa_kernel(SDPBackend.MATH):
        shapes = {name: fake.from_tensor(parameter) for name, parameter in step.named_parameters()}
        ids = torch.zeros(2, 1024, dtype=torch.int64)
        functional_call(step, shapes, (ids,))
    assert counter.get_total_flops() == SIZES[name].flops_per_token(1024) * ids.numel()


def peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch has given out at a time to `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "batch"), [(512, 2), (512, 12), (4096, 12)])
def test_the_sum_is_what_pytorch_has_given_out_at_the_peak(dtype: torch.dtype, vocab_size: int, batch: int) -> None:
    if dtype == torch.bfloat16 and batch > 2 and not found_hardware(torch.device("cpu")).cpu_bf16:
        pytest.skip("minutes where bfloat16 is emulated; one case runs there too")
    config = replace(footprint.CONFIG, vocab_size=vocab_size)
    found = peak(lambda: footprint.train(config, dtype, batch))
    assert reckon(config, batch, footprint.LENGTH, dtype).total == pytest.approx(found, rel=0.06)


def test_the_sum_is_that_of_activation_checkpointing_in_eager_mode() -> None:
    config, batch = replace(footprint.CONFIG, vocab_size=512), 12
    found = peak(lambda: footprint.train(config, torch.float32, batch, checkpointing=True))
    reckoned = reckon(config, batch, footprint.LENGTH, torch.float32, activation_checkpointing=True)
    assert reckoned.total == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sum_is_that_of_blocks_compiled_one_by_one_under_ddp(
    dtype: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    """And of several micro-steps, whose gradients need no second place beside DDP's buckets."""
    if dtype == torch.bfloat16 and not found_hardware(torch.device("cpu")).cpu_bf16:
        pytest.skip("minutes where bfloat16 is emulated")
    config, batch = replace(footprint.CONFIG, vocab_size=512), 6
    with one_rank(tmp_path):
        footprint.train(config, dtype, batch, compiled=True, ddp=True, checkpointing=checkpointing)  # compiles
        found = peak(
            lambda: footprint.train(config, dtype, batch, compiled=True, ddp=True, checkpointing=checkpointing)
        )
    reckoned = reckon(config, batch, footprint.LENGTH, dtype, compiled=True, activation_checkpointing=checkpointing)
    assert reckoned.total == pytest.approx(found, rel=0.06)


@contextmanager
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, for DDP."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_gradients_stay_in_their_places_where_they_are_views_of_buckets() -> None:
    """On any device but a CPU, where they always stay."""
    weight = nn.Parameter(torch.ones(3, device="meta"))
    weight.grad = place = torch.ones(3, device="meta")
    zero_gradients([weight], in_place=True)
    assert weight.grad is place
    zero_gradients([weight])
    assert weight.grad is None
    reduction = DDPReduction(DistributedDataParallel.__new__(DistributedDataParallel), DistContext(), 1)
    assert reduction.zero_in_place
    assert not DDPReduction(nn.Linear(1, 1), DistContext(), 1).zero_in_place


def test_validation_computes_no_gradient() -> None:
    config = GPTConfig(block_size=32, vocab_size=128, n_layer=2, n_head=2, n_embd=64)
    model, ids = GPT(config).init_weights(0), torch.zeros(3, 24, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids)
    assert 3 * counter.get_total_flops() == config.flops_per_token(24) * ids.numel()


def test_attention_gives_q_k_and_v_one_gradient_and_no_copy_of_it() -> None:
    attention, x = GPT(WIDE).init_weights(0).h[0].attn, torch.randn(2, 16, 256, requires_grad=True)
    y = attention(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y.sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::cat"] == 1
    assert "aten::stack" not in counts


def test_more_chunks_of_the_head_take_no_more_memory() -> None:
    weight = torch.randn(4096, 64, requires_grad=True)

    def step(chunks: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            head_loss(torch.zeros(chunks * 16, 64), weight, torch.zeros(chunks * 16, dtype=torch.int64), 16).backward()
        weight.grad = None

    for chunks in (4, 12):
        step(chunks)
    part = weight.numel() * torch.bfloat16.itemsize
    assert peak(lambda: step(12)) < peak(lambda: step(4)) + part


def test_what_is_added_to_the_heads_gradient_never_exists_whole() -> None:
    total, left, right = torch.zeros(8 * PRODUCT_ROWS, 64), torch.ones(4, 8 * PRODUCT_ROWS), torch.ones(4, 64)
    product = PRODUCT_ROWS * 64 * (torch.bfloat16.itemsize + torch.float32.itemsize)  # and its copy
    assert peak(lambda: add_product(total, left.bfloat16(), right.bfloat16())) <= left.nbytes + product
    assert torch.equal(total, torch.full_like(total, 4))


def test_a_training_process_holds_no_more_than_is_allowed_for() -> None:
    command, env = [sys.executable, "-m", "drivers.footprint"], environment({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    dtypes = ("float32", "bfloat16") if found_hardware(torch.device("cpu")).cpu_bf16 else ("float32",)  # else minutes
    started = [subprocess.Popen([*command, dtype], env=env, stdout=subprocess.PIPE) for dtype in dtypes]
    shares = [float(process.communicate()[0]) for process in started]
    assert all(USABLE["cpu"] < share < 1.1 for share in shares), shares


def test_the_page_about_gpus_is_what_the_command_prints() -> None:
    told = running.run([sys.executable, "-m", "gpt2_ddp.bench.gpus"])
    assert (told.returncode, told.stderr) == (0, "")
    assert (ROOT / "docs" / "gpus.md").read_text() == told.stdout, "python -m gpt2_ddp.bench.gpus > docs/gpus.md"


@pytest.mark.parametrize("preset", sorted((ROOT / "launch").glob("gpt2_*.toml")), ids=lambda path: path.stem)
def test_the_presets_tell_what_they_need(preset: Path) -> None:
    values = values_of(preset)
    name, size = values["model"], values["micro-batch-size"]
    needed = training_memory(
        SIZES[name],
        micro_batch_size=size,
        sequence_length=1024,
        dtype=torch.bfloat16,
        device_type="cuda",
        state_bytes=8 * parameter_count(SIZES[name]),
        device_memory=16 * 10**9 if "t4" in preset.name else 40 * 10**9,
        compiled=True,
    )
    assert re.search(rf"^#.* {size} sequences .*: {needed.total / 2**30:.0f} GiB", preset.read_text(), re.M)
