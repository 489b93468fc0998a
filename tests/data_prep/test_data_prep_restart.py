"""Interrupted anywhere, the same command ends at the same shards, and finished ones are left alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import documents, group_is_empty, kill_group, manifest, prepare, refused, start, write_jsonl
from running import tree, wait_until

FRACTION = ("--shard-tokens", 20_000, "--val-fraction", 0.1, "--workers", 2)
TOKENS = ("--shard-tokens", 20_000, "--val-tokens", 30_000, "--workers", 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 600,000 tokens in 35 chunks."""
    path = tmp_path_factory.mktemp("corpus") / "texts.parquet"
    pq.write_table(pa.table({"text": documents(350)}), path, row_group_size=10)
    return path


@pytest.fixture(scope="module")
def clean(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], Path]:
    """What runs that nothing disturbed have written, by their flags."""
    out = {flags: tmp_path_factory.mktemp("clean") for flags in (FRACTION, TOKENS)}
    for flags, directory in out.items():
        prepare("text", corpus, "--out", directory, *flags)
    return out


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a shard is written again: its inode and time of change."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.bin")}


@pytest.mark.parametrize(
    ("by", "flags"), [(signal.SIGKILL, FRACTION), (signal.SIGKILL, TOKENS), (signal.SIGINT, TOKENS)]
)
def test_interrupted_and_started_again(
    corpus: Path, clean: dict[tuple[object, ...], Path], tmp_path: Path, by: int, flags: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    interrupted = 0
    for shards in (1, 12):
        process = start("text", corpus, "--out", out, *flags)
        wait_until(lambda least=shards, run=process: len(finished(out)) >= least or run.poll() is not None)
        os.kill(process.pid, by)
        status = process.wait()
        wait_until(lambda group=process.pid: group_is_empty(group), timeout=20)
        if not manifest(out)["complete"]:
            interrupted += 1
            assert status == (130 if by == signal.SIGINT else -by)
    assert interrupted, "never in the middle"
    kept, before = finished(out), manifest(out)
    there = sum(shard["tokens"] for shard in before["shards"]) + sum(before["unfinished"].values())
    done = prepare("text", corpus, "--out", out, *flags)
    assert tree(out) == tree(clean[flags])
    assert {name: finished(out)[name] for name in kept} == kept
    if not before["complete"]:
        total = sum(shard["tokens"] for shard in manifest(out)["shards"])
        tokenized = re.search("tokenized ([0-9,]+) tokens", done.stdout)
        assert tokenized
        assert int(tokenized[1].replace(",", "")) == total - there


def test_killed_between_the_manifest_and_the_names(
    corpus: Path, clean: dict[tuple[object, ...], Path], tmp_path: Path
) -> None:
    """The manifest tells of a shard that still has its part's name: what a power failure can leave."""
    out = tmp_path / "out"
    process = start("text", corpus, "--out", out, *TOKENS)
    wait_until(lambda: len(finished(out)) >= 5)
    kill_group(process)
    assert not manifest(out)["complete"]
    name = manifest(out)["shards"][-1]["name"]
    if (out / name).exists():
        (out / name).rename(out / f"{name}.part")
    prepare("text", corpus, "--out", out, *TOKENS)
    assert tree(out) == tree(clean[TOKENS])


def test_a_killed_worker_stops_the_run_and_leaves_it_resumable(
    corpus: Path, clean: dict[tuple[object, ...], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start("text", corpus, "--out", out, *FRACTION, stderr=subprocess.PIPE)
    wait_until(lambda: len(finished(out)) >= 1)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    said = process.communicate(timeout=60)[1].decode().replace("\r", "\n").splitlines()
    assert process.returncode == 2
    assert said[-1] == "error: a tokenizing process was killed, perhaps for lack of memory: try fewer --workers"
    assert not [line for line in said if "Traceback" in line]
    wait_until(lambda: group_is_empty(process.pid), timeout=20)
    prepare("text", corpus, "--out", out, *FRACTION)
    assert tree(out) == tree(clean[FRACTION])


def test_another_source_or_other_settings_are_refused(tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "a.jsonl", documents(30)), tmp_path / "out"
    prepare("text", file, "--out", out, "--shard-tokens", 9000)
    before = tree(out)
    assert "--shard-tokens 9000, now asked for 9001" in refused("text", file, "--out", out, "--shard-tokens", 9001)
    assert "--val-tokens None" in refused("text", file, "--out", out, "--shard-tokens", 9000, "--val-tokens", 5)
    assert "the source" in refused("demo", "--out", out, "--shard-tokens", 9000)
    write_jsonl(file, documents(31))
    assert "its version" in refused("text", file, "--out", out, "--shard-tokens", 9000)
    assert tree(out) == before
    (out / "manifest.json").unlink()
    assert "was not made here" in refused("text", file, "--out", out)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    corpus: Path, clean: dict[tuple[object, ...], Path], tmp_path: Path
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        out = tmp_path / "out"
        assert refused("text", corpus, "--out", out, *FRACTION) == f"error: {out}: No space left on device"
        assert finished(out)
        subprocess.run(["mount", "-o", "remount,size=40m", tmp_path], check=True)
        prepare("text", corpus, "--out", out, *FRACTION)
        assert tree(out) == tree(clean[FRACTION])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_at_once_are_refused(corpus: Path, tmp_path: Path) -> None:
    process = start("text", corpus, "--out", tmp_path, *TOKENS)
    wait_until(lambda: manifest(tmp_path))
    process.send_signal(signal.SIGSTOP)
    try:
        assert "another data_prep is writing here" in refused("text", corpus, "--out", tmp_path, *TOKENS)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0


def test_a_lost_or_damaged_part_is_refused(corpus: Path, tmp_path: Path) -> None:
    process = start("text", corpus, "--out", tmp_path, *TOKENS)
    wait_until(lambda: sum(manifest(tmp_path).get("unfinished", {}).values()))
    kill_group(process)
    full = [shard["name"] for shard in manifest(tmp_path)["shards"]]
    for part in tmp_path.glob("*.part"):
        if part.stem not in full:  # a full one may not have its name yet
            os.truncate(part, 1024)
    assert "should hold" in refused("text", corpus, "--out", tmp_path, *TOKENS)
