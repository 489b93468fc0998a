"""The architecture, read from the source: `python tests/architecture.py` draws the floors and who imports whom."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

from running import ROOT

PACKAGES = ("gpt2_ddp", "data_prep", "eval", "launch")
FLOORS = (
    ("system",),
    ("model",),
    ("data",),
    ("distributed",),
    ("optim",),
    ("checkpoint",),
    ("metrics",),
    ("evaluation",),
    ("config",),
    ("run",),
    ("build", "periodic"),
    ("train", "bench"),
)
"""The rooms of gpt2_ddp, the lowest first. A module imports from its own room and from lower floors."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str) -> set[str]:
    """Our modules that `module` imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = [".".join(SOURCES[module].relative_to(ROOT).parts[: -node.level])] if node.level else []
            origin = ".".join([*package, *filter(None, [node.module])])
            members = {f"{origin}.{alias.name}" for alias in node.names} & SOURCES.keys()
            names |= members or {origin}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def reached(module: str) -> set[str]:
    """Everything of ours that comes along when `module` is imported."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imported(waiting.pop()) & SOURCES.keys() - found:
            found.add(name)
            waiting.append(name)
    return found


def room(module: str) -> str:
    """The first folder or file in gpt2_ddp that `module` lies in; "" for another package."""
    package, *parts = module.split(".")
    return parts[0] if package == "gpt2_ddp" and parts else ""


BESIDE = {
    "evaluation": "what is asked of a model beside its loss",
    "model.huggingface": "weights of other programs",
    "model.memory": "what fits into memory, told beforehand",
    "model.shapes": "what fits into memory, told beforehand",
    "model.compilation": "speed",
    "model.block_attention": "speed in bfloat16 on CPUs",
    "model.recomputation": "memory",
    "build.by_manifest": "tokens of another tokenizer, data without a validation split",
    "build.prolonging": "runs that go on for longer than they were to, and rates that jump",
    "system.allocator": "speed on CPUs",
    "system.checkout": "which program it was",
    "system.control_groups": "--micro-batch-size auto on CPUs",
    "system.console": "a console that nobody reads any more",
    "system.speed": "--dtype auto on CPUs",
    "system.cuda_build": "a GPU that PyTorch cannot use is explained",
    "system.hardware": "shares of a data sheet's peak",
    "system.usage": "--system-every",
    "build.micro_batch": "--micro-batch-size auto",
    "build.config_file": "--config",
    "build.evaluations": "what is asked of a model beside its loss",
    "build.boards": "TensorBoard and W&B",
    "build.telling": "the line that says what runs where",
    "build.resume": "a run that was stopped goes on",
    "build.beginning": "a directory that another trainer uses or without room, --init-from",
    "build.compiling": "speed",
    "checkpoint.choice": "a broken checkpoint is passed over",
    "system.fields": "a checkpoint from elsewhere is checked",
    "data.headerless": "files of another program",
    "data.mixture": "several data directories at once",
    "data.sources": "several data directories at once",
    "data.manifest": "a preparation that is not whole, or no longer, is refused",
    "data.tokenizer": "a checkpoint can be read by other programs",
    "data.own_tokenizer": "tokens of another tokenizer than GPT-2's",
    "distributed.drift": "ranks that differ are found",
    "distributed.rendezvous": "nodes that do not meet are named",
    "distributed.stopping": "signals",
    "distributed.watchdog": "ranks that hang",
    "metrics.profiling": "--profile-steps",
    "metrics.boards": "TensorBoard and W&B",
    "metrics.progress": "how long a run still takes",
    "optim.muon": "--optimizer muon",
    "optim.spikes": "losses that jump",
}
"""What of gpt2_ddp a run does not need in order to get from its flags to a trained checkpoint, and why it is there."""
PATH_LIMIT = 2500
"""Lines of code, without blank ones, comments and docstrings, of what remains."""


def code_lines(module: str) -> int:
    """Lines of a module that are neither blank nor comments nor docstrings."""
    text = SOURCES[module].read_text()
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def path_to_a_checkpoint() -> list[str]:
    """The modules that every run needs, from its flags to a trained checkpoint."""
    names = reached("gpt2_ddp.train") | {"gpt2_ddp.train"}
    beside = tuple(f"gpt2_ddp.{name}" for name in BESIDE)
    return sorted(name for name in names if not any(name == other or name.startswith(f"{other}.") for other in beside))


def drawn() -> str:
    """The floors from the highest down: modules, lines of code, and how often a floor imports from which others."""
    lines = [
        "| floor | modules | lines of code | imports from its own | imports from lower floors |",
        "|---|---|---|---|---|",
    ]
    for rooms in reversed(FLOORS):
        for name in rooms:
            modules = [module for module in SOURCES if room(module) == name]
            arrows = Counter(room(other) for module in modules for other in imported(module))
            own = arrows.pop(name, 0)
            below = ", ".join(
                f"{other} {count}" for other, count in sorted(arrows.items(), key=lambda arrow: (-arrow[1], arrow[0]))
            )
            lines.append(f"| {name} | {len(modules)} | {sum(map(code_lines, modules))} | {own} | {below} |")
    path = path_to_a_checkpoint()
    total = sum(code_lines(name) for name in SOURCES if room(name))
    lines += [
        "",
        f"From flags to a trained checkpoint: {sum(map(code_lines, path))} of {total} lines, {len(path)} modules.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawn())
