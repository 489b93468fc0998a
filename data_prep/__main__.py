"""`python -m data_prep {demo,text,hub,fineweb-edu,shakespeare,hellaswag,train-tokenizer} --out DIR`, `inspect DIR`."""

from __future__ import annotations

import sys

from gpt2_ddp.system.cli import parse, run

from .commands import Command, HellaSwag, Inspect, Shards


def main() -> int:
    """Do what the command line says."""
    command: Shards | HellaSwag | Inspect = parse(Command, "Text to token shards.")  # type: ignore[arg-type]
    try:
        command.run()
    except KeyboardInterrupt:
        if isinstance(command, Inspect):
            raise
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run(main, prints_result="inspect" in sys.argv[1:2])
