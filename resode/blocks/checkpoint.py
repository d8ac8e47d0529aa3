"""Gradient mode ``checkpoint``: the exact gradient of a solve from its states alone.

The forward pass keeps the state at the start of each accepted step. The backward pass goes through the steps from the
last to the first, makes each again from its state, and differentiates it: the gradient of backpropagation, at the
memory of one step's stages and one state a step (checkpointing: Griewank & Walther 2000, ACM TOMS 26).
"""

import torch

from resode.blocks.gradients import Gradients, leaves_of, vjp
from resode.blocks.solvers import RungeKutta, Scheme, Solve, State


class Checkpoint:
    """The mode, for one solve."""

    name = "checkpoint"

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def forward(self, f: Solve, scheme: Scheme, state: State) -> tuple[State, State]:
        kept: list[torch.Tensor] = []

        def keep(start: float, end: float, at: State) -> None:
            self.steps.append((start, end))
            kept.extend(at)

        return scheme.integrate(f, state, RungeKutta(scheme.tableau), keep), tuple(kept)

    def evaluate(self, f: Solve, scheme: Scheme, state: State) -> State:
        return scheme.integrate(f, state, RungeKutta(scheme.tableau))

    def backward(self, f: Solve, scheme: Scheme, kept: State, cotangent: State, gradients: Gradients) -> State:
        step, parts = RungeKutta(scheme.tableau), len(cotangent)
        for i in reversed(range(len(self.steps))):
            start, end = self.steps[i]
            f.begin_step(start, end)
            with torch.enable_grad():
                state = leaves_of(kept[i * parts : (i + 1) * parts])
                after = step(f, start, end, state).state
            cotangent = vjp(after, state, cotangent, gradients)
        return cotangent
