"""Solvers with an error control: torchdiffeq's embedded Runge–Kutta pairs, kept to the contract of a solve."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from resode.blocks.solvers import Solve
from resode.errors import InvalidInput, SolverError

ADAPTIVE = ("dopri5", "bosh3", "dopri8", "adaptive_heun")
MAX_STEPS = 10_000

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Adaptive:
    """torchdiffeq's adaptive solvers, from ``t0`` to ``t1``, one solve between each two breakpoints.

    torchdiffeq would step beyond ``t1`` and interpolate back; here it is made to land on it, so that the branch is
    never evaluated outside [t0, t1]. The step sizes are no part of the graph: backpropagation gives the exact gradient
    of the steps that were made. The state is at least float32, whatever the branch computes in: torchdiffeq keeps the
    time in the state's type, and no error control works on 8 bits.
    """

    method: str
    t0: float
    t1: float
    rtol: float
    atol: float
    breakpoints: tuple[float, ...] = ()

    def integrate(self, f: Solve, h: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            raise InvalidInput(
                f"{self.method} does not go with torch.func's transforms: use a fixed grid (rk4), which does"
            )
        dtype = h.dtype
        h = h.to(wide(dtype))
        for start, end in pairwise(self.pieces()):
            h = self.solve_piece(_Watched(f, start, end, dtype), h)
        return h.to(dtype)

    def pieces(self) -> tuple[float, ...]:
        """t0, the breakpoints between (one, where several differ by rounding alone), t1."""
        found, close = [self.t0], 1e-9 * (self.t1 - self.t0)
        for point in sorted(self.breakpoints):
            if found[-1] + close < point < self.t1 - close:
                found.append(point)
        return (*found, self.t1)

    def solve_piece(self, f: "TimeField", state: State) -> State:
        """torchdiffeq's solve of ``f``, from its start to its end.

        Raises:
            SolverError: when it cannot go on: the step size underflows, the state is not finite, or 10,000 steps
                were not enough.
        """
        times = torch.tensor([f.start, f.end], dtype=torch.float64, device=_first(state).device)
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
            if f.evaluating:  # it is the branch's own
                raise
            raise SolverError(
                f"{self.method} cannot go on at t = {f.t:.6g} on the way from {f.start:g} to {f.end:g} "
                f"({str(problem).split(':')[0]}, ‖f‖ = {float(_first(f.slope).norm()):.3g}): f is too steep or not "
                f"finite there; try looser tolerances than rtol = {self.rtol:g}, atol = {self.atol:g}, a fixed grid "
                "(rk4), or smaller weights"
            ) from problem
        return path[-1] if isinstance(path, Tensor) else tuple(part[-1] for part in path)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of a state whose branch computes in ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _first(state: State) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


class TimeField:
    """``f(t, state)`` as torchdiffeq sees it, from ``start`` to ``end`` (either may be the larger).

    For its first step size torchdiffeq evaluates f as far beyond ``end`` as it likes (and at t = NaN where f is NaN):
    such a t is clamped.
    """

    def __init__(self, f: Callable[[float, State], State], start: float, end: float) -> None:
        self.f, self.start, self.end = f, start, end
        self.t, self.slope, self.evaluating = start, torch.zeros(()), False

    def __call__(self, t: Tensor, state: State) -> State:
        low, high = sorted((self.start, self.end))
        self.t = min(max(low, float(t.detach())), high)
        self.evaluating = True
        self.slope = self.f(self.t, state)
        self.evaluating = False
        return self.slope

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        dt.detach_()  # torchdiffeq leaves its first step size, and so the place of every step, in the graph


class _Watched(TimeField):
    """A solve that follows each step torchdiffeq tries, accepts or rejects (by its callbacks).

    f's first value is the first stage of the first step; the evaluation that follows only chooses a step size, and
    belongs to no step.
    """

    def __init__(self, solve: Solve, start: float, end: float, dtype: torch.dtype) -> None:
        super().__init__(lambda t, h: solve(t, h.to(dtype)).to(h.dtype), start, end)
        self.solve = solve
        self.started = False
        solve.context.begin_step(start, end)

    def __call__(self, t: Tensor, h: Tensor) -> Tensor:
        slope = super().__call__(t, h)
        if not self.started:
            self.solve.context.accept_step()
            self.started = True
        return slope

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        super().callback_step(t0, y0, dt)
        # The step's piece, not the step, is what decides pieces of weights and masks: it has no breakpoint inside.
        self.solve.context.begin_step(self.start, self.end)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.solve.context.accept_step()
        self.solve.stats.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.solve.stats.rejected += 1
