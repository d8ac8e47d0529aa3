"""Gradient mode ``reversible``: an algebraically reversible form of any explicit tableau.

With Ψ_Δ(t, h) the increment of the tableau's step, a coupling λ in (0, 1], and y_0 = z_0 = x, a step is

    y' = λ y + (1 − λ) z + Ψ_Δ(t, z),        z' = z − Ψ_{−Δ}(t + Δ, y'),

which is undone by z = z' + Ψ_{−Δ}(t + Δ, y'), y = (y' − (1 − λ) z − Ψ_Δ(t, z))/λ (McCallum & Foster 2024, arXiv
2410.11648, eqs. 1–2). The backward pass undoes the steps one by one and differentiates each, so that its memory does
not grow with their number; the gradient is exact for this solve, which has the tableau's order and evaluates f twice
as often a step. Undoing multiplies rounding by up to λ^(−N)."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.blocks.gradients import Gradients, leaves_of, vjp
from resode.blocks.solvers import RightHandSide, Scheme, Solve, State, Trial, make_step
from resode.blocks.tableaux import Tableau

COUPLING = 0.99
AMPLIFICATION = 100.0
"""Of rounding, by undoing the steps: where λ^(−N) exceeds it, the backward pass warns."""


def halves(state: State) -> tuple[State, State]:
    """y and z."""
    return state[: len(state) // 2], state[len(state) // 2 :]


@dataclass(frozen=True)
class ReversibleStep:
    """The step (y, z) → (y', z') of a tableau; the error of an embedded pair is that of its step from z."""

    tableau: Tableau
    coupling: float = COUPLING

    @property
    def error_order(self) -> int:
        return self.tableau.embedded_order or 0

    def core(self, state: State) -> State:
        return halves(state)[1]

    def __call__(
        self,
        f: RightHandSide,
        t: float,
        end: float,
        state: State,
        first: State | None = None,
        control: bool = False,
        reused: bool = False,
    ) -> Trial:
        y, z = halves(state)
        base = tuple(torch.lerp(one, other, 1.0 - self.coupling) for one, other in zip(y, z, strict=True))
        step = make_step(f)
        trial = step(f, self.tableau, t, end, z, first=first, base=base, control=control)
        z = step(f, self.tableau, end, t, trial.state, base=z, sign=-1.0).state
        return Trial((*trial.state, *z), trial.error)

    def undo(
        self, f: Solve, t: float, end: float, state: State, cotangent: State, gradients: Gradients
    ) -> tuple[State, State]:
        """State and cotangent before the step from ``t`` to ``end``, from those after it.

        Each half is undone by the very evaluations that are differentiated.
        """
        step, rest = make_step(f), 1.0 - self.coupling
        y_end, z_end = halves(state)
        ybar, zbar = halves(cotangent)
        with torch.enable_grad():
            y_leaf = leaves_of(y_end)
            z = step(f, self.tableau, end, t, y_leaf, base=z_end).state
        ybar = _sum(ybar, vjp(z, y_leaf, tuple(-part for part in zbar), gradients))
        with torch.enable_grad():
            z_leaf = leaves_of(z)
            base = tuple(rest * one.detach() - other for one, other in zip(z, y_end, strict=True))
            negative = step(f, self.tableau, t, end, z_leaf, base=base).state
        through = vjp(negative, z_leaf, ybar, gradients)
        zbar = tuple(a + rest * b + c for a, b, c in zip(zbar, ybar, through, strict=True))
        y = tuple(part.detach() / -self.coupling for part in negative)
        return (*y, *(part.detach() for part in z)), (*(self.coupling * part for part in ybar), *zbar)


class Reversible:
    """The mode, for one solve.

    ``start`` is, after a backward pass, the state that it came back to.
    """

    name = "reversible"

    def __init__(self, coupling: float = COUPLING) -> None:
        self.coupling = coupling
        self.steps: list[tuple[float, float]] = []
        self.start: Tensor | None = None

    def forward(self, f: Solve, scheme: Scheme, state: State) -> tuple[State, State]:
        step = ReversibleStep(scheme.tableau, self.coupling)
        end = scheme.integrate(f, (*state, *state), step, lambda start, end, _: self.steps.append((start, end)))
        return halves(end)[0], end

    def evaluate(self, f: Solve, scheme: Scheme, state: State) -> State:
        return self.forward(f, scheme, state)[0]

    def backward(self, f: Solve, scheme: Scheme, kept: State, cotangent: State, gradients: Gradients) -> State:
        self._warn()
        step, state = ReversibleStep(scheme.tableau, self.coupling), kept
        cotangent = (*cotangent, *(torch.zeros_like(part) for part in cotangent))
        for start, end in reversed(self.steps):
            f.begin_step(start, end)
            state, cotangent = step.undo(f, start, end, state, cotangent, gradients)
        self.start = state[0]
        return _sum(*halves(cotangent))

    def _warn(self) -> None:
        grown = _power(self.coupling, -len(self.steps))
        if grown > AMPLIFICATION:
            warnings.warn(
                f"gradient='reversible' with {len(self.steps)} steps and coupling {self.coupling:g}: undoing them "
                f"multiplies rounding by up to {grown:.3g}; use a coupling nearer 1, fewer steps, or "
                "gradient='checkpoint'",
                stacklevel=2,
            )


def _power(base: float, exponent: int) -> float:
    """base^exponent, which Python refuses to compute where it is too large for a float."""
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def _sum(one: State, other: State) -> State:
    return tuple(a + b for a, b in zip(one, other, strict=True))
