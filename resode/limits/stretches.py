"""Stretches: the steps of a network that act one after the other on one space of states.

Depth is a time only there: between stages the resolution changes, and the state before is not compared with the state
after. A stretch is the longest run of residual steps of a stage whose shortcut is the identity.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from resode.dynamics import ResidualDynamics, Step
from resode.dynamics.step import identity
from resode.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Stretch:
    """``steps`` of a stage, of which the first is step ``first`` of the network."""

    stage: int
    first: int
    steps: tuple[Step, ...]

    @property
    def depth(self) -> int:
        """L, the number of steps."""
        return len(self.steps)

    @property
    def last(self) -> int:
        """The step of the network after the stretch; the states around its steps are first … last."""
        return self.first + len(self.steps)

    @property
    def duration(self) -> float:
        """The time that the steps of solvers take; residual blocks take 1 together."""
        solved = [step.end - step.t for step in self.steps if step.end is not None]
        return math.fsum(solved) + float(len(solved) < len(self.steps))


def stretches(view: ResidualDynamics) -> list[Stretch]:
    """The stretches of ``view``, in order.

    Raises:
        InvalidInput: when there is none, as in a plain net.
    """
    found = list(_stretches(view))
    if not found:
        raise InvalidInput(
            "no step of the network is residual with the identity as its shortcut: it has no dynamics in depth to look "
            "at; use a residual net or an ODE net"
        )
    return found


def _stretches(view: ResidualDynamics) -> Iterator[Stretch]:
    first, run = 0, []
    for i, step in enumerate(view.steps):
        if run and (not keeps_space(step) or step.stage != run[-1].stage):
            yield Stretch(run[-1].stage, first, tuple(run))
            run = []
        if keeps_space(step):
            first = first if run else i
            run.append(step)
    if run:
        yield Stretch(run[-1].stage, first, tuple(run))


def keeps_space(step: Step) -> bool:
    """Whether the step adds to the state itself."""
    return step.has_choice and (step.shortcut is identity or type(step.shortcut) is nn.Identity)
