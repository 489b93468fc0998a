"""Values out of a JSON object that may come from anybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from gpt2_ddp.system.errors import UserError

MOST = 1 << 62
"""Numbers stay below it in size, so that they and their sums fit in 64 bits."""


def field(values: Mapping[str, Any], name: str, is_good: Callable[[Any], bool]) -> Any:
    """`values[name]`.

    Raises:
        UserError: where it is missing or not good.
    """
    value = values.get(name)
    if not is_good(value):
        raise UserError(f"{name} cannot be {json.dumps(value)[:60]}")
    return value


def count(values: Mapping[str, Any], name: str) -> int:
    """A whole number from 0 on.

    Raises:
        UserError: where it is something else.
    """
    return int(field(values, name, lambda value: isinstance(value, int) and is_finite(value) and value >= 0))


def text(values: Mapping[str, Any], name: str) -> str:
    """
    Raises:
        UserError: where it is no text.
    """
    return str(field(values, name, lambda value: isinstance(value, str)))


def json_object_in(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """
    Raises:
        UserError: where it is no JSON object.
    """
    return dict(field(values, name, lambda value: isinstance(value, dict)))


def is_finite(value: object) -> bool:
    """Whether `value` is a number below `MOST` in size; nan is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
