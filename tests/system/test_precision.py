"""Design section 8 as a table: which number format on which hardware, without the hardware."""

from __future__ import annotations

import itertools
import json
import sys
import time
import timeit
from pathlib import Path

import pytest
import torch
from drivers import warm

from gpt2_ddp.system.hardware import Hardware, found_hardware, peak_flops
from gpt2_ddp.system.precision import COMPILE_FLOPS, Precision, choose_compile, choose_dtype
from gpt2_ddp.system.speed import MatmulSpeed, measure_speed

CPU = torch.device("cpu")
MACHINES = {
    "P100": Hardware(device_type="cuda", name="Tesla P100-PCIE-16GB", capability=(6, 0)),
    "V100": Hardware(device_type="cuda", name="Tesla V100-SXM2-16GB", capability=(7, 0)),
    "T4": Hardware(device_type="cuda", name="Tesla T4", capability=(7, 5)),
    "A100": Hardware(device_type="cuda", name="NVIDIA A100-SXM4-80GB", capability=(8, 0)),
    "H100": Hardware(device_type="cuda", name="NVIDIA H100 80GB HBM3", capability=(9, 0)),
    "H100 PCIe": Hardware(device_type="cuda", name="NVIDIA H100 PCIe", capability=(9, 0)),
    "new CPU": Hardware(device_type="cpu", name="CPU", cpu_bf16=True),
    "old CPU": Hardware(device_type="cpu", name="CPU", cpu_bf16=False),
    "Mac": Hardware(device_type="mps"),
}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("P100", torch.float32),
        ("V100", torch.float16),
        ("T4", torch.float16),
        ("A100", torch.bfloat16),
        ("H100", torch.bfloat16),
        ("new CPU", torch.float32),  # until it is measured
        ("old CPU", torch.float32),
        ("Mac", torch.float32),
    ],
)
def test_auto_takes_what_the_hardware_is_good_at(machine: str, expected: torch.dtype) -> None:
    assert choose_dtype("auto", MACHINES[machine]) == (expected, None)


@pytest.mark.parametrize("machine", ["new CPU", "old CPU"])
@pytest.mark.parametrize(
    ("float32", "bfloat16", "line"),
    [
        (0.32, 0.16, "float32 by measurement: 0.32 TFLOP/s against 0.16 in bfloat16"),  # AVX512-BF16 without AMX
        (0.168, 0.0204, "float32 by measurement: 0.17 TFLOP/s against 0.02 in bfloat16"),  # emulated
        (0.3, 1.2, "bfloat16 by measurement: 1.2 TFLOP/s against 0.3 in float32"),
        (0.31, 0.33, "float32 by measurement: 0.31 TFLOP/s against 0.33 in bfloat16"),  # the rest of a step is slower
    ],
)
def test_a_cpu_takes_what_is_measured_to_be_clearly_faster(
    machine: str, float32: float, bfloat16: float, line: str
) -> None:
    speed = MatmulSpeed(float32=float32 * 1e12, bfloat16=bfloat16 * 1e12)
    dtype, said = choose_dtype("auto", MACHINES[machine], speed)
    assert said == f"dtype: {line}"
    assert str(dtype) == f"torch.{line.split()[0]}"


def test_the_measurement_agrees_with_a_square_matmul() -> None:
    here = found_hardware(CPU)
    speed = measure_speed("auto", here, 1024)
    assert speed is not None
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(384, 384, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=5))
    assert speed.float32 == pytest.approx(2 * 384**3 / seconds[torch.float32], rel=1)
    square = seconds[torch.float32] / seconds[torch.bfloat16]
    if not 0.6 < square < 2.4:  # else the shapes may decide
        assert (choose_dtype("auto", here, speed)[0] == torch.bfloat16) == (square > 1)


def test_passes_that_something_else_interrupts_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    here, linear, passes = found_hardware(CPU), torch.nn.functional.linear, itertools.count()

    def interrupted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            time.sleep(0.03)  # so that the slower format is known
        elif next(passes) < 4:
            time.sleep(0.1)
        return linear(x, weight)

    monkeypatch.setattr("torch.nn.functional.linear", interrupted)
    speed = measure_speed("auto", here, 16)
    assert choose_dtype("auto", here, speed)[0] == torch.float32


def test_one_thread_is_measured_whatever_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two busy cores two threads were seen at a hundredth of their speed, at which emulated bfloat16 looks fast."""
    linear, seen = torch.nn.functional.linear, set[int]()
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda *layer: (seen.add(torch.get_num_threads()), linear(*layer))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_speed("auto", found_hardware(CPU), 16)
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_only_auto_on_a_cpu_is_measured() -> None:
    assert measure_speed("float32", MACHINES["new CPU"], 64) is None
    assert measure_speed("auto", MACHINES["A100"], 64) is None
    assert measure_speed("auto", MACHINES["Mac"], 64) is None


def start_said(out_dir: Path, ended: warm.Ended) -> tuple[list[str], str]:
    """What the line of the start says about the dtype, and what the last start noted in config.json."""
    parts = [part for line in ended.stdout.splitlines() if " parameters | " in line for part in line.split(" | ")]
    lines = [part for part in parts if part.startswith(("bfloat16", "float32"))]
    return lines, json.loads((out_dir / "config.json").read_text())["starts"][-1]["dtype"]


def test_a_run_keeps_what_rank_0_measured_unless_a_flag_says_otherwise(tmp_path: Path, data_dir: Path) -> None:
    out_dir = tmp_path / "run"
    fast, slow = [4e11, 1e11], [1e11, 4e11]
    stop = {"stop_after": {"step": 1}}
    ended = warm.fork_ranks(
        2, out_dir, data_dir, "--dtype=auto", faults={"matmuls": {"float32": slow, "bfloat16": fast}, **stop}
    )
    assert "rank 1 is measured" not in ended.stderr
    assert start_said(out_dir, ended) == (
        ["bfloat16 by measurement: 0.4 TFLOP/s against 0.1 in float32"], "torch.bfloat16"
    )  # fmt: skip
    other_machine = {"matmuls": {"float32": fast, "bfloat16": slow}}
    ended = warm.train(
        out_dir, data_dir, "--dtype=auto", faults={**other_machine, "stop_after": {"step": 2}}, status=75
    )
    assert start_said(out_dir, ended) == (
        ["bfloat16, as at the start before; --dtype changes it"], "torch.bfloat16"
    )  # fmt: skip
    newest = str(max((out_dir / "checkpoints").glob("step_*")))
    copy = ("--dtype=auto", "--max-steps=3", f"--resume={newest}")
    ended = warm.train(tmp_path / "copy", data_dir, *copy, faults=other_machine)
    assert start_said(tmp_path / "copy", ended)[1] == "torch.bfloat16"
    ended = warm.train(out_dir, data_dir, "--dtype=float32", "--max-steps=3", faults=other_machine)
    assert start_said(out_dir, ended) == (["float32 by --dtype; the run had bfloat16"], "torch.float32")


@pytest.mark.parametrize(("machine", "better"), [("T4", "float16"), ("V100", "float16"), ("old CPU", "float32")])
def test_emulated_bfloat16_is_obeyed_with_a_warning(machine: str, better: str) -> None:
    dtype, warning = choose_dtype("bfloat16", MACHINES[machine])
    assert dtype == torch.bfloat16
    assert warning is not None
    assert "emulate" in warning
    assert f"--dtype {better}" in warning


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_what_is_asked_for_is_obeyed(machine: str) -> None:
    hardware = MACHINES[machine]
    assert choose_dtype("float16", hardware) == (torch.float16, None)
    assert choose_dtype("float32", hardware) == (torch.float32, None)
    assert choose_dtype("bfloat16", hardware)[0] == torch.bfloat16
    assert choose_compile("on", hardware, run_flops=0)
    assert not choose_compile("off", hardware, run_flops=1e30)


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_compiling_is_chosen_where_it_pays(machine: str) -> None:
    hardware = MACHINES[machine]
    for flops in (COMPILE_FLOPS / 2, COMPILE_FLOPS * 2):
        knows_triton = hardware.capability is not None and hardware.capability >= (7, 0)
        long_on_cpu = hardware.device_type == "cpu" and flops > COMPILE_FLOPS
        assert choose_compile("auto", hardware, run_flops=flops) == (knows_triton or long_on_cpu)


def test_without_a_compiler_only_a_flag_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = found_hardware(CPU)
    assert not choose_compile("auto", bare, run_flops=COMPILE_FLOPS * 2)
    assert choose_compile("on", bare, run_flops=0)
    (tmp_path / "g++").touch(mode=0o755)
    if sys.platform == "linux":
        assert choose_compile("auto", found_hardware(CPU), run_flops=COMPILE_FLOPS * 2)


@pytest.mark.parametrize("machine", ["A100", "H100", "new CPU"])
def test_native_bfloat16_needs_no_warning(machine: str) -> None:
    assert choose_dtype("bfloat16", MACHINES[machine]) == (torch.bfloat16, None)


PEAKS = {  # as torch.cuda.get_device_name() gives them: bfloat16, float16, float32
    "Tesla P100-PCIE-16GB": (None, None, None),
    "Tesla V100-SXM2-32GB": (None, 125, 15.7),
    "Tesla V100-PCIE-16GB": (None, 112, 14),
    "Tesla V100S-PCIE-32GB": (None, 130, 16.4),
    "Tesla T4": (None, 65, 8.1),
    "NVIDIA A100-SXM4-80GB": (312, 312, 156),
    "NVIDIA A100 80GB PCIe": (312, 312, 156),
    "A100-SXM4-40GB": (312, 312, 156),
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": (None, None, None),
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (None, None, None),
    "NVIDIA A40-8Q": (None, None, None),
    "NVIDIA A30": (165, 165, 82),
    "NVIDIA A10": (125, 125, 62.5),
    "NVIDIA A10G": (70, 70, 35),
    "NVIDIA A40": (149.7, 149.7, 74.8),
    "NVIDIA RTX A6000": (154.8, 154.8, 77.4),
    "NVIDIA L4": (121, 121, 60),
    "NVIDIA L40": (181.05, 181.05, 90.5),
    "NVIDIA L40S": (362.05, 362.05, 183),
    "NVIDIA H100 80GB HBM3": (989, 989, 494),
    "NVIDIA H100 PCIe": (756, 756, 378),
    "NVIDIA H100 NVL": (835, 835, 417),
    "NVIDIA H200": (989, 989, 494),
    "NVIDIA H200 NVL": (835, 835, 417),
    "NVIDIA GH200 480GB": (989, 989, 494),
    "NVIDIA B200": (2250, 2250, 1100),
    "NVIDIA GB200": (2500, 2500, 1250),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 364.2, 182.1),
    "Quadro RTX 6000": (None, None, None),
    "NVIDIA GeForce RTX 3090": (71, 71, 35.6),
    "NVIDIA GeForce RTX 3090 Ti": (None, None, None),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6),
    "NVIDIA GeForce RTX 4090 D": (None, None, None),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (None, None, None),
    "NVIDIA GeForce RTX 5090": (209.5, 209.5, 104.8),
    "NVIDIA T400": (None, None, None),
    "Quadro T4000": (None, None, None),
    "NVIDIA A1000": (None, None, None),
    "AMD Instinct MI300X": (None, None, None),
    "": (None, None, None),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_of_the_data_sheets(name: str) -> None:
    """None for what the table does not know, for a card that only resembles a known one, and for a part of a card."""
    hardware = Hardware(device_type="cuda", name=name, capability=(8, 0))
    found = [peak_flops(hardware, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == [pytest.approx(tera * 1e12) if tera else None for tera in PEAKS[name]]


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(MACHINES["new CPU"], torch.bfloat16) is peak_flops(MACHINES["Mac"], torch.float32) is None


def test_this_cpu_is_what_linux_says_it_is() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else pytest.skip("no Linux")
    if not {"avx2", "sse2"} & set(flags):
        pytest.skip("no x86 processor")
    hardware = found_hardware(CPU)
    assert hardware.device_type == "cpu"
    assert hardware.cpu_bf16 == bool({"avx512_bf16", "amx_bf16"} & set(flags))


def test_weights_stay_float32_and_matmuls_change() -> None:
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        precision = Precision.of(dtype, CPU)
        with precision.autocast():
            assert linear(x).dtype == dtype
        assert linear.weight.dtype == torch.float32
        assert precision.scaler.is_enabled() == (dtype == torch.float16)
