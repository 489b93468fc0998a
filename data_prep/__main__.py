"""`python -m data_prep {demo,text,hub,fineweb-edu,shakespeare,hellaswag} --out DIR`."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import subcommand

from gpt2_ddp.system.cli import parse, run

from .commands import Demo, FinewebEdu, HellaSwag, Hub, Shakespeare, Text

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Text, subcommand("text")]
    | Annotated[Hub, subcommand("hub")]
    | Annotated[FinewebEdu, subcommand("fineweb-edu")]
    | Annotated[Shakespeare, subcommand("shakespeare")]
    | Annotated[HellaSwag, subcommand("hellaswag")]
)


def main() -> int:
    """Do what the command line says."""
    command: Demo | Text | Hub | FinewebEdu | Shakespeare | HellaSwag
    command = parse(Command, "Text to token shards.")  # type: ignore[arg-type]
    try:
        command.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run(main)
