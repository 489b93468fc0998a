"""Nothing grows with the data: 10 billion sparse tokens against 1 million, by counts; the times are data_cost.py's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from data_cost import CACHED, MAPPED, OPEN, PEAK, SETS, USS, WINDOWS, make_set, measured_apart

from gpt2_ddp.data.windows import OPEN_SHARDS

BATCHES = 4
PAGE = 4096
IN_FLIGHT = 48 * 2**20
"""Batches of 4 MiB in each of several places at once, as the threads happen to run; four batches mapped took 260."""


@pytest.mark.skipif(shutil.which("fincore") is None, reason="needs fincore of util-linux to see the page cache")
def test_nothing_grows_with_the_data(tmp_path: Path) -> None:
    sets = [make_set(tmp_path / str(shards), shards, tokens) for shards, tokens in SETS.values()]
    small, large = (measured_apart(folder, BATCHES) for folder in sets)
    assert small[WINDOWS] == 976  # all there are
    assert large[WINDOWS] == BATCHES * 512
    for told in (small, large):
        assert told[MAPPED] == 0
        assert told[OPEN] <= OPEN_SHARDS
    assert large[PEAK] < small[PEAK] + IN_FLIGHT
    assert large[USS] < small[USS] + IN_FLIGHT
    # Two steps are read ahead of the one that is asked for: 3 steps from step 1 on, BATCHES + 4 from step 15,000 on. A
    # window of 2 KB lies on one or two pages; opening reads a page of each header and eight places of two or three.
    windows, shards = (3 + BATCHES + 4) * 512, 101
    assert large[CACHED] <= PAGE * (2 * windows + (1 + 8 * 3) * shards)
