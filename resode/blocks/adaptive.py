"""Solvers with an error control: torchdiffeq's embedded Runge–Kutta pairs, kept to the contract of a solve."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from resode.blocks.solvers import Solve
from resode.errors import SolverError

ADAPTIVE = ("dopri5", "bosh3", "dopri8", "adaptive_heun")
MAX_STEPS = 10_000

State = Tensor | tuple[Tensor, ...]
TimeField = Callable[[Tensor, State], State]


@dataclass(frozen=True)
class Adaptive:
    """torchdiffeq's adaptive solvers, from ``t0`` to ``t1``, one solve between each two breakpoints.

    torchdiffeq would step beyond ``t1`` and interpolate back; here it is made to land on it, so that the branch is
    never evaluated outside [t0, t1].
    """

    method: str
    t0: float
    t1: float
    rtol: float
    atol: float
    breakpoints: tuple[float, ...] = ()

    def integrate(self, f: Solve, h: Tensor) -> Tensor:
        for start, end in pairwise(self.pieces()):
            watched = _Watched(f, start, end)
            h = self.solve_piece(watched, h, start, end)
            watched.finish()
        return h

    def pieces(self) -> tuple[float, ...]:
        """t0, the breakpoints between, t1."""
        inside = (b for b in self.breakpoints if min(self.t0, self.t1) < b < max(self.t0, self.t1))
        return (self.t0, *sorted(inside, reverse=self.t1 < self.t0), self.t1)

    def solve_piece(self, f: TimeField, state: State, start: float, end: float) -> State:
        """torchdiffeq's solve of ``f`` from ``start`` to ``end``.

        Raises:
            SolverError: when it cannot go on: the step size underflows, the state is not finite, or 10,000 steps
                were not enough.
        """
        first = state if isinstance(state, Tensor) else state[0]
        times = torch.tensor([start, end], dtype=torch.float64, device=first.device)
        try:
            path = odeint(
                f,
                state,
                times,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options={"step_t": times[1:], "max_num_steps": MAX_STEPS},
            )
        except AssertionError as problem:  # torchdiffeq's way to say that it cannot go on
            raise SolverError(
                f"{self.method} cannot go on at t = {getattr(f, 't', start):.6g} on the way from {start:g} to {end:g} "
                f"({str(problem).split(':')[0]}): f is too steep or not finite there; try looser tolerances than "
                f"rtol = {self.rtol:g}, atol = {self.atol:g}, a fixed grid (rk4), or smaller weights"
            ) from problem
        return path[-1] if isinstance(path, Tensor) else tuple(part[-1] for part in path)


class _Watched:
    """A solve as torchdiffeq sees it: it reports each step it tries, accepts or rejects (torchdiffeq's callbacks).

    f's first value is the first stage of the first step; the evaluation that follows only chooses a step size, and
    belongs to no step.
    """

    def __init__(self, solve: Solve, start: float, end: float) -> None:
        self.solve, self.start, self.end = solve, start, end
        self.t = start
        self.started = False
        solve.context.begin_step(start, end)

    def __call__(self, t: Tensor, h: Tensor) -> Tensor:
        self.t = float(t.detach())
        out = self.solve(self.t, h)
        if not self.started:
            self.solve.context.accept_step()
            self.started = True
        return out

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        # The step's piece, not the step, is what decides pieces of weights and masks: it has no breakpoint inside.
        self.solve.context.begin_step(self.start, self.end)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.solve.context.accept_step()
        self.solve.stats.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.solve.stats.rejected += 1

    def finish(self) -> None:
        self.solve.context.begin_step(self.start, self.end)
