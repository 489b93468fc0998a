"""HellaSwag numbers that others have published, to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

CHANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class Published:
    """Accuracies on the 10,042 examples of the validation set; `protocol` None is one of the paper's own."""

    model: str
    protocol: str | None
    acc: float | None
    acc_norm: float
    source: str


PUBLISHED = (
    Published(model="GPT-2 124M", protocol="completion", acc=0.2859, acc_norm=0.2955, source="build-nanogpt"),
    Published(model="GPT-2 1558M", protocol="completion", acc=0.3842, acc_norm=0.4893, source="build-nanogpt"),
    Published(model="GPT-2 124M", protocol="harness", acc=0.2892, acc_norm=0.3114, source="lm-evaluation-harness"),
    Published(model="GPT-2 1558M", protocol="harness", acc=0.4004, acc_norm=0.5089, source="lm-evaluation-harness"),
    Published(
        model="GPT-3 Small (124M)", protocol=None, acc=None, acc_norm=0.337, source="Brown et al. 2020, zero-shot"
    ),
)


def published_for(protocol: str) -> list[Published]:
    """What may be compared with a number by `protocol`; those of no protocol of ours come last."""
    return [number for number in PUBLISHED if number.protocol in (protocol, None)]
