"""What the trainer needs of tyro: the flags of one dataclass, `--name value`, `--name=value`, `--on` and `--no-on`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class Marks:
    """Everything of `tyro.conf` that annotations use; it changes nothing here."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: name


conf = Marks()


def cli(config: Any, *, args: Sequence[str] | None = None, default: Any = None, **_: Any) -> Any:
    """`config` from the flags; SystemExit with status 2 for one that is wrong, as tyro does it."""
    hints = get_type_hints(config)
    given = dataclasses.asdict(default) if default is not None else {}
    words = [part for word in (sys.argv[1:] if args is None else args) for part in split(word)]
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if hints.get(name.removeprefix("no_")) is bool:
            given[name.removeprefix("no_")] = not name.startswith("no_")
        elif name in hints and words:
            given[name] = converted(hints[name], words.pop(0))
        else:
            sys.stderr.write(f"unknown flag or no value: --{name}\n")
            raise SystemExit(2)
    return config(**given)


def split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") else [word]


def converted(hint: Any, text: str) -> Any:
    """`text` as the first of the hint's types that takes it."""
    if get_origin(hint) is Literal and text in map(str, get_args(hint)):
        return text
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            with suppress(SystemExit):
                return converted(each, text)
    if hint is NoneType and text == "None":
        return None
    if isinstance(hint, type) and hint is not NoneType:
        with suppress(ValueError):
            return hint(text)
    sys.stderr.write(f"{text!r} is no {hint}\n")
    raise SystemExit(2)
