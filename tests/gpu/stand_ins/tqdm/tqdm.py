"""`tqdm` where the package is not there, for the trainer and for PyTorch, which would do without: no bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class tqdm:  # noqa: N801  its name
    """Yields what it is given, and draws nothing."""

    def __init__(self, iterable: Iterable[Any] = (), *_: object, **__: object) -> None:
        self._items = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: float = 1) -> None: ...

    def close(self) -> None: ...
