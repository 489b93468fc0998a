"""`--config FILE`: flags from a TOML file, or from the config.json of a run, before those of the command line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt2_ddp.config import TrainConfig, flag
from gpt2_ddp.system import cli
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTION = "--config"


def parse_flags(argv: Sequence[str], description: str = "") -> TrainConfig:
    """The configuration by `argv`, and by a `--config` file in it, whose flags come before all others, which win.

    Raises:
        UserError: where a flag is refused; where the file is not there, is no TOML or a run's config.json, or names a
            flag that there is not.
    """
    named = [after for before, after in pairwise(argv) if before == OPTION]
    named += [word.partition("=")[2] for word in argv if word.startswith(f"{OPTION}=")]
    if not named:
        return cli.parse(TrainConfig, description, argv)
    words = [*flags_of(Path(named[-1])), *argv]
    try:
        return cli.parse(TrainConfig, description, words)
    except UserError as error:
        raise UserError(f"{error} (with the flags in {named[-1]})") from None


def flags_of(file: Path) -> list[str]:
    """The flags that a file sets, as words of a command line. Raises as `parse_flags`."""
    known = {field.name for field in fields(TrainConfig)} - {"config"}
    found: list[str] = []
    for key, value in values_of(file).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"; perhaps {flag(near[0])[2:]}" if near else ""
            raise UserError(f"{file}: there is no flag {key}{mend}")
        if isinstance(value, bool):
            found.append(flag(name) if value else flag(f"no_{name}"))
        elif name == "data_dir" and isinstance(value, list) and all(isinstance(word, str) for word in value):
            found += [flag(name), *value]
        elif isinstance(value, (str, int, float)):
            found.append(f"{flag(name)}={value}")
        elif value is not None:  # in a config.json: a flag that was not given
            raise UserError(f"{file}: {key} should be one value, is {str(value)[:60]}")
    return found


def values_of(file: Path) -> Mapping[str, Any]:
    """The names and values in a file. Raises as `parse_flags`."""
    if not file.is_file():
        raise UserError(f"{OPTION} {file}: there is no such file")
    try:
        if file.suffix == ".json":
            saved = read_json(file).get("config")
            if not isinstance(saved, dict):
                raise ValueError("holds no configuration of a run")
            return {name: value for name, value in saved.items() if name not in ("config", "resume")}
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
