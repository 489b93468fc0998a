"""`TrainConfig`: every choice of a training run, and its command line."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_ddp.data.sources import METAVAR, DataDir, source_faults
from gpt2_ddp.model.gpt import SIZES, GPTConfig, model_config
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT-2. The same command runs on one process or, under torchrun, on many."""

    config: Path | None = None
    """Flags from this TOML file, or from a run's config.json; those of the command line win."""
    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SIZES) + "}")] = "gpt2"
    """Size of the model: 124M, 350M, 774M and 1558M parameters, distilgpt2 with 82M, and three small ones."""
    vocab_size: int | None = None
    """Rows of the token embedding; if not given, 50304 for GPT-2's tokens, for those of another tokenizer their number
    rounded up to a multiple of 128."""
    init_from: str | None = None
    """Start from these weights: a run, a checkpoint, a Hugging Face GPT-2 directory, or a published GPT-2's name."""
    data_dir: Annotated[DataDir, tyro.conf.arg(metavar=METAVAR)] = Path("data/demo")
    """Folder of token shards, as `python -m data_prep` makes it; or several to be mixed by weight, as A:0.7 B:0.3."""
    out_dir: Path = Path("runs/gpt2")
    """The run directory: checkpoints, metrics and status."""
    seed: int = 1337
    """Decides the initial weights, the order of the data and the dropout masks."""
    dropout: float = 0.0
    """Probability of dropping an activation."""

    sequence_length: int = 1024
    """Tokens in a training sequence."""
    micro_batch_size: int | Literal["auto"] = 4
    """Sequences that one rank computes at once; auto takes the largest power of two that fits in memory."""
    total_batch_size: int = 32768
    """Tokens in a step, over all ranks and micro-steps."""
    max_steps: int = 19073
    """Steps in the whole run."""
    warmup_steps: int = 715
    """Steps over which the learning rate rises linearly."""
    max_lr: float = 6e-4
    """Learning rate after the warm-up."""
    min_lr: float | None = None
    """Learning rate at the last step; if not given, a tenth of --max-lr for cosine, 0 for the others."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """The way from --max-lr to --min-lr: half a cosine, a line, or (wsd) none until the last steps and a line there."""
    cooldown_fraction: float = 0.4
    """Of all steps, those of wsd's line. A finished wsd run goes on from before it when --max-steps is raised."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for everything else."""
    muon_lr: float = 4e-3
    """Muon's own --max-lr, in AdamW's units, by the sweep in docs/experiments.md; it follows the same --schedule. There
    everything else, at --max-lr, wanted as high a rate."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov's)."""
    muon_momentum_warmup: int = 300
    """Updates over which Muon's momentum rises from 0.85."""
    muon_weight_decay: float = 0.1
    """Decay of the matrices that Muon updates."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of matmuls; auto takes bfloat16 on GPUs that have it, float16 on older tensor cores, and on a CPU
    the one of float32 and bfloat16 that is measured to be faster. A run keeps what it began with."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step with torch.compile; auto does where it pays."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass, which computes the block again: about a fifth more work for a
    fraction of the memory."""

    log_every: int = 1
    """Steps between two lines of the log. A logged step waits for the device."""
    val_every: int = 250
    """Steps between two validations; 0 is never."""
    val_tokens: int = 1048576
    """Tokens of a validation, the same for any number of ranks; at most what the validation shards hold."""
    hellaswag_every: int = 0
    """Steps between two HellaSwag evaluations; 0 is never."""
    hellaswag_data: Path = Path("data/hellaswag/hellaswag_val.jsonl")
    """The HellaSwag examples, as `python -m data_prep hellaswag` writes them."""
    hellaswag_protocol: Literal["completion", "harness"] = "completion"
    """How to score HellaSwag: as build-nanogpt and llm.c do, or as the lm-evaluation-harness does."""
    sample_every: int = 0
    """Steps between two samples of text; 0 is never."""
    noise_scale_every: int = 0
    """Steps between two measurements of the gradient noise scale, each of which takes the work of about 1.1 steps and
    the memory of one more set of gradients; 0 is never."""
    system_every: int = 0
    """Steps between two readings of how busy processor, memory, disk and, with the extra [gpu], GPUs are; 0 is never.
    They are the event `system` of metrics.jsonl, on rank 0's node."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; 0 is never, but the last step and a stop always save one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep; 0 keeps all."""

    skip_limit: int = 20
    """Steps in a row that may be skipped because a gradient was not finite; one more ends the run."""
    spike_guard: float = 0.0
    """Go back to the last checkpoint and pass over the data since, when a loss is this many standard deviations above
    the recent ones; 0 is off, 6 a careful choice."""
    spike_limit: int = 3
    """How often the spike guard may go back in a run."""
    check_ranks_every: int = 100
    """Steps between two comparisons of the ranks' weights, and before each checkpoint; 0 is never."""
    reproducible: bool = False
    """The same weights to the bit on any power-of-two number of ranks; slower, and on one kind of hardware."""
    profile_steps: Annotated[str | None, tyro.conf.arg(metavar="A:B")] = None
    """Record the steps from A to B: a trace for ui.perfetto.dev in the run directory, a table on the console."""
    tensorboard: bool = False
    """Also show configuration, metrics, samples and state in TensorBoard: files in the run directory."""
    wandb: bool = False
    """Also send configuration, metrics, samples and state to Weights & Biases."""

    resume: str = "auto"
    """auto continues the run in --out-dir if there is one; never refuses to; or a checkpoint or run to go on from."""

    timeout: float = 300.0
    """Seconds after which a rank that does not answer ends the run; before its first step is done, 30 minutes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, all faults at once.

        Raises:
            UserError: naming each bad flag, what it is and what it may be.
        """
        faults = source_faults(self.data_dir)
        block_size = model_config(self.model).block_size
        if self.sequence_length > block_size:
            faults.append(f"--sequence-length {self.sequence_length} is past the model's {block_size}")
        for name in ("sequence_length", "micro_batch_size", "total_batch_size", "max_steps", "log_every", "vocab_size"):
            if getattr(self, name) not in ("auto", None) and getattr(self, name) < 1:
                faults.append(f"{flag(name)} {getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "val_every", "hellaswag_every", "sample_every", "noise_scale_every",
                     "system_every", "checkpoint_every", "keep_checkpoints", "skip_limit", "spike_guard", "spike_limit",
                     "check_ranks_every", "max_lr", "min_lr", "muon_lr", "muon_momentum_warmup", "muon_weight_decay",
                     "weight_decay", "grad_clip", "seed"):  # fmt: skip
            if not 0 <= (getattr(self, name) or 0) < 2**64:  # refuses nan too, and seeds that PyTorch does not take
                faults.append(f"{flag(name)} {getattr(self, name)} must be 0 or a positive number, less than 2^64")
        for name in ("dropout", "beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{flag(name)} {getattr(self, name)} must be at least 0 and below 1")
        if self.val_every and self.val_tokens < self.sequence_length:
            faults.append(f"--val-tokens {self.val_tokens} is less than one sequence of {self.sequence_length}")
        if not 0 < self.cooldown_fraction <= 1:
            faults.append(f"--cooldown-fraction {self.cooldown_fraction} must be above 0 and at most 1")
        if self.profile_steps is not None and not self.profiled_steps:
            faults.append(f"--profile-steps {self.profile_steps} must be two steps A:B, as 10:12, A at least 1")
        if not 0 < self.timeout < math.inf:
            faults.append(f"--timeout {self.timeout} must be positive")
        if faults:
            raise UserError("; ".join(faults))

    @property
    def shape(self) -> GPTConfig:
        """The model's shape."""
        return model_config(self.model, dropout=self.dropout, vocab_size=self.vocab_size)

    @property
    def profiled_steps(self) -> range:
        """The steps that --profile-steps names; none where it names none."""
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps or "")
        return range(int(found[1]), int(found[2]) + 1) if found and int(found[1]) else range(0)

    @property
    def final_lr(self) -> float:
        """The learning rate at the last step."""
        usual = self.max_lr / 10 if self.schedule == "cosine" else 0.0
        return usual if self.min_lr is None else self.min_lr

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON carries them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def flag(field: str) -> str:
    """The command-line flag of a field."""
    return "--" + field.replace("_", "-")
