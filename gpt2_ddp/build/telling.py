"""What a run says at its start: what runs where, in one line."""

from __future__ import annotations

from gpt2_ddp.build.making import Made
from gpt2_ddp.build.settling import Settled
from gpt2_ddp.data.sources import shown
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.system.precision import dtype_name

FORMAT = "dtype: "
"""So begins a line that says why the number format is what it is: it becomes a part of the one line."""


def start_lines(settled: Settled, made: Made, context: DistContext) -> list[str]:
    """What was said while the run was put together, and then what runs where, if there is a step left to run."""
    others = [line for line in settled.said if not line.startswith(FORMAT)]
    return others + ([start_line(settled, made, context)] if made.state.step < settled.config.max_steps else [])


def start_line(settled: Settled, made: Made, context: DistContext) -> str:
    """Model, data, steps, ranks and devices, number format, micro-steps."""
    config, plan, hardware = settled.config, settled.plan, settled.hardware
    windows, first, last = len(settled.sources.train), made.state.step + 1, config.max_steps
    passes = last * plan.sequences_per_step / windows
    epochs = f"{passes:,.0f} epochs" if passes >= 100 else f"{passes:.3g} epochs"
    if first == 1:
        steps = f"{counted(last, 'step')} of {plan.total_batch_size:,} tokens, {epochs}"
    else:
        steps = f"steps {first:,} to {last:,} of {plan.total_batch_size:,} tokens, {epochs} in all"
    micro_batch = f"{plan.micro_batch_size} x {plan.sequence_length:,} tokens"
    compiled = any(isinstance(part, CompiledGPT) for part in made.train_model.modules())
    nodes = context.world_size // context.local_world_size
    return " | ".join(
        [
            f"{config.model}, {short(parameter_count(made.model.config))} parameters",
            f"{shown(config.data_dir)}, {short(windows * plan.sequence_length)} tokens",
            steps,
            f"{counted(context.world_size, 'rank')}{f' on {nodes} nodes' if nodes > 1 else ''}, "
            f"{' '.join(filter(None, [hardware.device_type, hardware.name]))}",
            number_format(settled),
            "compiled" if compiled else "not compiled",
            f"{counted(plan.grad_accum_steps, 'micro-step')} of {micro_batch}",
        ]
    )


def number_format(settled: Settled) -> str:
    """The dtype of the matmuls, and why, where that was said."""
    why = "; ".join(line.removeprefix(FORMAT) for line in settled.said if line.startswith(FORMAT))
    return why or dtype_name(settled.precision.dtype)


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def short(number: int) -> str:
    """In three digits: 124M, 9.95B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:  # else it would be 1e+03 of the smaller unit
            return f"{number / size:.3g}{unit}"
    return str(number)
