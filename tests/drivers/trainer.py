"""The trainer with things going wrong: `python tests/drivers/trainer.py [trainer flags]`, also under torchrun.

The environment variable FAULTS holds a JSON object: names of functions in faults.py, surroundings.py or watchers.py,
and their arguments.
The trainer has one more model, `gpt2-tiny`, whose steps take milliseconds. With `--serve` the process reads requests on
its standard input and forks a trainer for each: a real process with an exit status and signals, without the seconds
that importing torch takes. So it does with other programs.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch._dynamo  # noqa: F401  so that forked trainers, which need it, have it
from drivers.faults import FAULTS
from drivers.surroundings import SURROUNDINGS
from drivers.watchers import WATCHERS

from gpt2_ddp import train
from gpt2_ddp.data.tokenizer import tokenizer_files
from gpt2_ddp.model.gpt import SIZES, GPTConfig
from gpt2_ddp.system import cli

TINY = GPTConfig(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=16)


def run(argv: list[str], faults: dict[str, Any]) -> None:
    """Train, with `faults`, and leave the process as `python -m gpt2_ddp.train` does."""
    sys.argv = ["gpt2_ddp.train", *argv]
    SIZES["gpt2-tiny"] = TINY
    for name, arguments in faults.items():
        (FAULTS | SURROUNDINGS | WATCHERS)[name](**arguments)
    cli.run(train.main)


def run_program(words: list[str]) -> None:
    """Do as `python WORDS` would: a script and its arguments, or `-m` and a module."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def leave(main: Callable[[], None]) -> None:
    """End this process as `main` would, without taking the interpreter down, which costs more than a run."""
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answer each request, one line of JSON: `argv`, `faults`, `env`, `output`, `console` start one, `wait` waits.

    With `program` these words of a Python's command line are run in the place of the trainer.
    """
    tokenizer_files()  # which stay with each child
    gc.freeze()  # else each child would copy all of this process's objects when it looks for garbage
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            os.setsid()
            os.environ.update(request["env"])
            for number, name in ((1, "stdout"), (2, "stderr")):
                path = request["console"] or f"{request['output']}.{name}"
                # a terminal becomes the session's own where it is opened for reading too
                mode = os.O_RDWR if path.startswith("/dev/pts") else os.O_WRONLY
                descriptor = os.open(path, mode | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, number)
                os.close(descriptor)
            if request["program"]:
                leave(lambda words=request["program"]: run_program(words))
            leave(lambda request=request: run(request["argv"], request["faults"]))
        print(answer, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        run(sys.argv[1:], json.loads(os.environ.get("FAULTS", "{}")))
