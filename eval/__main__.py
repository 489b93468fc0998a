"""`python -m eval {hellaswag,val-loss,sample,plot,report,convert}`, under torchrun too."""

from __future__ import annotations

from typing import Annotated

import tyro

from eval.convert import Convert
from eval.hellaswag import HellaSwag
from eval.plot import Plot
from eval.report.command import Report
from eval.sample import Sample
from eval.val_loss import ValLoss
from gpt2_ddp.system.cli import parse, run

Command = (
    Annotated[HellaSwag, tyro.conf.subcommand("hellaswag")]
    | Annotated[ValLoss, tyro.conf.subcommand("val-loss")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)


def main() -> None:
    described = "What a model is worth, what its run was like, and its weights for other programs."
    command: HellaSwag | ValLoss | Sample | Plot | Report | Convert
    command = parse(Command, described)  # type: ignore[arg-type]
    command.run()


if __name__ == "__main__":
    run(main, prints_result=True)
