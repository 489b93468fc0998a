"""AdamW against Muon, each under its schedules: every run of docs/experiments.md, its table and its picture.

    python docs/experiments/optimizers.py run DATA OUT        one run after the other; start it twice for two at a time
    python docs/experiments/optimizers.py tell OUT            the table, and OUT/curves.png
    python docs/experiments/optimizers.py average DATA OUT    means of a run's last weights

DATA is what `python -m data_prep text` made; OUT gets a run directory for each run. A run that is done is left as it
is, and one that was stopped goes on. What a later stage runs follows from what the stage before has found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, SEEDS = 500, ("1337", "1", "2")
COMMON = {
    "model": "gpt2-micro",
    "sequence-length": "256",
    "micro-batch-size": "4",
    "total-batch-size": "1024",
    "warmup-steps": "25",
    "val-every": "50",
    "val-tokens": "32768",
    "checkpoint-every": "100",
    "keep-checkpoints": "1",
    "dtype": "float32",
    "compile": "off",
    "log-every": "5",
}
RATES = ("1e-3", "2e-3", "4e-3")
"""The grid, the same for both. Under Muon the rest of the model, AdamW's share, takes the rate of the matrices."""
BEYOND = {"1e-3": "5e-4", "5e-4": "2.5e-4", "2.5e-4": "1.25e-4", "4e-3": "8e-3", "8e-3": "1.6e-2"}
"""What is run as well where the best rate is the first or the last of those that were."""
SCHEDULES = ("linear", "wsd", "cosine")
SHORTER = (75, 100, 150, 200)
"""Steps of Muon's shorter runs, chosen when the grids were known: around those at which it comes to AdamW's ends."""
TAIL = {"checkpoint_every": "20", "keep_checkpoints": "6"}
"""Of runs under wsd, whose last weights are averaged: six checkpoints over the last 100 steps."""
Flags = dict[str, str]


def arm(optimizer: str, schedule: str, rate: str, *, steps: int = STEPS, seed: str = SEEDS[0], **more: str) -> Flags:
    """The flags of a run beside `COMMON`; those of `more` win."""
    flags = {"optimizer": optimizer, "schedule": schedule, "max-lr": rate, "max-steps": str(steps), "seed": seed}
    if optimizer == "muon":
        flags |= {"muon-lr": rate, "muon-momentum-warmup": "100"}
    more = (TAIL if schedule == "wsd" else {}) | more
    return flags | {name.replace("_", "-"): value for name, value in more.items()}


def name_of(flags: Flags) -> str:
    usual = {"max-steps": str(STEPS), "seed": SEEDS[0], "muon-lr": flags["max-lr"], "muon-momentum-warmup": "100"}
    first = [flags["optimizer"], flags["schedule"], flags["max-lr"]]
    rest = [f"{key}={value}" for key, value in flags.items() if key in usual and value != usual[key]]
    known = {"optimizer", "schedule", "max-lr", *usual}
    return "_".join(first + rest + [f"{key}={value}" for key, value in flags.items() if key not in known])


def events(run: Path, kind: str) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line for line in lines if line["event"] == kind]


def final_loss(out: Path, flags: Flags) -> float | None:
    """The validation loss at the last step; None of a run that is not done."""
    done = [
        event["val_loss"] for event in events(out / name_of(flags), "val") if event["step"] == int(flags["max-steps"])
    ]
    return done[-1] if done else None


def grid(out: Path, optimizer: str, schedule: str) -> tuple[list[str], str | None]:
    """The rates to run, and the one of the lowest final loss; None while one of them is not done."""
    rates = list(RATES)
    while True:
        losses = {rate: final_loss(out, arm(optimizer, schedule, rate)) for rate in rates}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(known) < len(rates):
            return rates, None
        best = min(known, key=lambda rate: known[rate])
        if BEYOND.get(best, best) in rates:
            return rates, best
        rates.append(BEYOND[best])


def stages(out: Path) -> Iterator[Flags]:
    """Every run, in the order in which they are made: for each schedule the grid and more seeds, and what goes beside.

    A later stage is there once the stages before it are done.
    """
    for schedule in SCHEDULES:
        grids = {optimizer: grid(out, optimizer, schedule) for optimizer in ("adamw", "muon")}
        for optimizer, (rates, _) in grids.items():
            for rate in rates:
                yield arm(optimizer, schedule, rate)
        for seed in SEEDS[1:]:
            for optimizer, (_, best) in grids.items():
                if best is not None:
                    yield arm(optimizer, schedule, best, seed=seed)
        if schedule == SCHEDULES[0]:
            yield from beside({optimizer: best for optimizer, (_, best) in grids.items() if best is not None})


def beside(best: dict[str, str]) -> Iterator[Flags]:
    """At the best rates under a line to 0: shorter runs of Muon, and what else was tried."""
    if muon := best.get("muon"):
        for steps in SHORTER:
            for seed in SEEDS:
                yield arm("muon", "linear", muon, steps=steps, seed=seed)
        yield arm("muon", "linear", muon, muon_momentum_warmup="0")
        for factor in (0.5, 2.0):  # AdamW's share, the tied embedding before all
            yield arm("muon", "linear", f"{float(muon) * factor:g}", muon_lr=muon)
        yield arm("muon", "linear", "6e-4", muon_lr=muon)  # the trainer's own default
    for optimizer, rate in best.items():
        yield arm(optimizer, "linear", rate, beta2="0.99")


def train(flags: Flags, data: Path, out: Path) -> int:
    """One run in a process of one thread; 2 is what is wrong, as that another one is at it."""
    given = COMMON | flags
    command = [sys.executable, "-m", "gpt2_ddp.train", *(part for key in given for part in (f"--{key}", given[key]))]
    command += ["--data-dir", str(data), "--out-dir", str(out / name_of(flags))]
    with (out / f"{name_of(flags)}.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT, check=False).returncode


def run(data: Path, out: Path) -> int:
    """Make every run that is not done, until none is left that this process can make."""
    out.mkdir(parents=True, exist_ok=True)
    tried: set[str] = set()
    while waiting := [flags for flags in stages(out) if name_of(flags) not in tried and final_loss(out, flags) is None]:
        tried.add(name_of(waiting[0]))
        print(name_of(waiting[0]), flush=True)
        if (status := train(waiting[0], data.resolve(), out.resolve())) not in (0, 2):
            return status
    return 0 if any(final_loss(out, flags) is not None for flags in stages(out)) else 2


def tell(out: Path) -> int:
    """The table in Markdown, by seeds where there are several, and the curves of validation as a picture."""
    groups: dict[str, list[Flags]] = {}
    for flags in stages(out):
        groups.setdefault(name_of(flags | {"seed": SEEDS[0]}), []).append(flags)
    print("| run | validation loss at the end | seeds | deviation | s a step |\n|---|---|---|---|---|")
    for name, members in groups.items():
        losses = [loss for flags in members if (loss := final_loss(out, flags)) is not None]
        if losses:
            steps = [event["step_ms"] / 1000 for flags in members for event in events(out / name_of(flags), "train")]
            spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
            row = [name, f"{statistics.mean(losses):.4f}", str(len(losses)), spread, f"{statistics.median(steps):.2f}"]
            print(f"| {' | '.join(row)} |")
    draw(out, {name: members for name, members in groups.items() if len(members) > 1})
    return 0


def average(data: Path, out: Path) -> int:
    """The validation loss of the mean of the last checkpoints of each run that kept them, beside that of its end."""
    from safetensors.torch import load_file, save_file

    data, out = data.resolve(), out.resolve()
    for run in sorted(path for path in out.glob("*checkpoint-every*") if path.is_dir()):
        files = sorted(run.glob("checkpoints/step_*/model.safetensors"))
        for count in (1, 2, 3, 6):
            weights = [load_file(file) for file in files[-count:]]
            mean = {name: sum(each[name].double() for each in weights).div(count).float() for name in weights[0]}
            folder = out / "averages" / f"{run.name}_{count}"
            shutil.copytree(files[-1].parent, folder, dirs_exist_ok=True)
            save_file(mean, folder / "model.safetensors", metadata={"format": "pt"})
            command = ["-m", "eval", "val-loss", "--model", str(folder), "--data-dir", str(data), "--dtype", "float32"]
            command += ["--val-tokens", COMMON["val-tokens"], "--device", "cpu"]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return 0


def draw(out: Path, groups: dict[str, list[Flags]]) -> None:
    """An optimizer's colour, a schedule's dashes; of Muon's shorter runs, thin, only the ends have a label."""
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    _, axes = plt.subplots(figsize=(8, 5))
    for members in groups.values():
        for flags in members:
            found = events(out / name_of(flags), "val")
            steps, losses = [event["step"] for event in found], [event["val_loss"] for event in found]
            optimizer, whole = {"adamw": "AdamW", "muon": "Muon"}[flags["optimizer"]], flags["max-steps"] == str(STEPS)
            label = f"{optimizer}, {flags['schedule']}, {flags['max-lr']}" if flags is members[0] and whole else None
            look = {"color": {"AdamW": "C0", "Muon": "C1"}[optimizer], "lw": 1.4 if whole else 0.7, "label": label}
            axes.plot(steps, losses, {"linear": "-", "cosine": "--", "wsd": ":"}[flags["schedule"]], **look)
            if not whole and flags is members[0] and losses:
                axes.annotate(f"{flags['max-steps']} steps", (steps[-1], losses[-1]), (-6, -14), fontsize=8,
                              textcoords="offset points", ha="right")  # fmt: skip
    axes.set(
        xlabel="step",
        ylabel="validation loss, nats a token",
        title="A line for each seed; thin: whole runs of fewer steps",
        xlim=(0, 1.02 * STEPS),
    )
    axes.legend()
    plt.savefig(out / "curves.png", dpi=120, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("run", run), ("tell", tell), ("average", average)):
        command = commands.add_parser(name)
        for place in ("data", "out") if does is not tell else ("out",):
            command.add_argument(place, type=Path)
        command.set_defaults(does=does)
    chosen = vars(parser.parse_args())
    del chosen["command"]
    return int(chosen.pop("does")(**chosen))


if __name__ == "__main__":
    sys.exit(main())
