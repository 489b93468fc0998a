"""What a control group grants, in trees of files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch

from data_prep import prepare
from eval import val_loss
from eval.model_choice import OpenModel
from eval.val_loss import BUSY_TOKENS
from gpt2_ddp.build import micro_batch
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import SIZES
from gpt2_ddp.system.control_groups import available_memory, cpu_quota
from gpt2_ddp.system.precision import Precision

MIB = 1 << 20


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name.replace("__", ".")).write_text(contents + "\n")
    return folder


def member(tmp_path: Path, lines: str) -> Path:
    (tmp_path / "membership").write_text(lines)
    return tmp_path / "membership"


def test_the_tightest_of_the_groups_above_holds_in_version_2(tmp_path: Path) -> None:
    root, own = tmp_path / "root", member(tmp_path, "0::/job/step\n")
    machine = psutil.virtual_memory().total
    assert 0 < available_memory(root, own) <= machine
    group(root / "job" / "step", memory__max="max", memory__current=str(9 * MIB), cpu__max="max 100000")
    assert available_memory(root, own) > 100 * MIB
    assert cpu_quota(root, own) is None
    group(root / "job", memory__max=str(30 * MIB), memory__current=str(12 * MIB), cpu__max="250000 100000")
    assert (available_memory(root, own), cpu_quota(root, own)) == (18 * MIB, 2.5)
    group(root / "job", memory__stat=f"anon 5\nfile 7\ninactive_file {2 * MIB}\nactive_file 3")
    assert available_memory(root, own) == 20 * MIB
    group(root / "job" / "step", memory__max=str(8 * MIB), cpu__max="50000 100000")
    assert (available_memory(root, own), cpu_quota(root, own)) == (0, 0.5)


@pytest.mark.parametrize("seen", ["job/step", ""])
def test_version_1_by_its_own_paths_and_in_a_container_that_does_not_see_them(tmp_path: Path, seen: str) -> None:
    root, own = tmp_path / "root", member(tmp_path, "4:memory:/job/step\n3:cpu,cpuacct:/job/step\n0::/elsewhere\n")
    group(root / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes=str(MIB))
    group(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert available_memory(root, own) > 100 * MIB
    assert cpu_quota(root, own) is None
    stat = f"inactive_file 1\ntotal_inactive_file {MIB}"
    group(
        root / "memory" / seen,
        memory__limit_in_bytes=str(9 * MIB),
        memory__usage_in_bytes=str(3 * MIB),
        memory__stat=stat,
    )
    group(root / "cpu" / seen, cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert (available_memory(root, own), cpu_quota(root, own)) == (7 * MIB, 3.0)


def test_who_takes_what_there_is_takes_no_more_than_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 10 * MIB)
    assert micro_batch.find_memory(DistContext())[0] == 10 * MIB
    opened = SimpleNamespace(
        context=DistContext(),
        gpt=SimpleNamespace(config=SIZES["gpt2-nano"]),
        sequence_length=16,
        precision=Precision.of(torch.float32, torch.device("cpu")),
    )
    for free, size in ((0, 1), (1 << 40, BUSY_TOKENS["cpu"] // 16)):
        monkeypatch.setattr(val_loss, "available_memory", lambda free=free: free)
        assert val_loss.chosen_micro_batch(cast(OpenModel, opened)) == size
    monkeypatch.setattr("psutil.cpu_count", lambda **_: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quota, workers in ((2.9, 2), (0.5, 1), (None, 64), (100.0, 64)):
        monkeypatch.setattr(prepare, "cpu_quota", lambda quota=quota: quota)
        assert prepare.chosen_workers(None) == workers
        assert prepare.chosen_workers(9) == 9
