"""Design section 8 as a table: which number format on which hardware, without the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt2_ddp.precision import (
    COMPILE_FLOPS,
    Hardware,
    Precision,
    choose_compile,
    choose_dtype,
    found_hardware,
    peak_flops,
)

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
        ("new CPU", torch.bfloat16),
        ("old CPU", torch.float32),
        ("Mac", torch.float32),
    ],
)
def test_auto_takes_what_the_hardware_is_good_at(machine: str, expected: torch.dtype) -> None:
    assert choose_dtype("auto", MACHINES[machine]) == (expected, None)


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
