"""The ``resode`` command: a module for each subcommand."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from resode.cli.check import Check
from resode.cli.common import flags_of_preset
from resode.cli.evaluate import Evaluate
from resode.cli.lesion import Lesion
from resode.cli.limits import Limits
from resode.cli.spectrum import Spectrum
from resode.cli.train import Demo, Train
from resode.commandline import one_line_errors, read_arguments
from resode.heap import keep_freed_memory

__all__ = ["main"]


def commands(arguments: Sequence[str]) -> Any:
    """The subcommands; those that train begin from the preset that ``arguments`` name, so that --help shows it."""
    preset = flags_of_preset(arguments)
    return (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Train, tyro.conf.subcommand("train", default=Train(**preset))]
        | Annotated[Check, tyro.conf.subcommand("check", default=Check(**preset))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Lesion, tyro.conf.subcommand("lesion")]
        | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
        | Annotated[Limits, tyro.conf.subcommand("limits")]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what the user can mend is one line on the standard error, and a non-zero exit."""
    description = "Residual dynamics: one branch, run as a ResNet or as a neural ODE, and analysed as both."
    if arguments is None:  # the process is the command's own
        keep_freed_memory()
        arguments = sys.argv[1:]
    command = read_arguments(commands(arguments), "resode", description, arguments)
    with one_line_errors("resode"):
        command.run()
