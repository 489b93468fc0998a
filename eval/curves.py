"""What is done to a curve before it is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

SMOOTHED_FROM = 100
"""Points from which on a curve is drawn pale, with its running median over it."""


def running_median(values: Sequence[float], at: Iterable[int]) -> list[float]:
    """The median of the values around each index in `at`: of a twenty-fifth of all, fewer at the ends.

    The window is symmetric at the start, where a loss is steep.
    """
    numbers, reach = np.asarray(values), len(values) // 50
    reaches = ((index, min(reach, index)) for index in at)
    return [float(np.median(numbers[index - r : index + r + 1])) for index, r in reaches]


def thinned(values: Sequence[float], most: int) -> list[int]:
    """The indices of at most `most` values, in order: the first, the last, and the extremes of each stretch between.

    So no spike is lost, however short.
    """
    if len(values) <= most:
        return list(range(len(values)))
    ends = np.linspace(0, len(values), most // 2).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(ends):
        stretch = np.asarray(values[start:end])
        kept |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    return sorted(kept)
