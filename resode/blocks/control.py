"""Step-size control: embedded pairs whose steps follow from tolerances.

A step of an embedded pair gives a solution and an estimate e of its error. With the scaled norm

    ‖e‖ = √(mean((e / (atol + rtol·max(|h_n|, |h_{n+1}|)))²))

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, eq. II.4.11; over the whole batch, or the
largest over its samples) the step is accepted if ‖e‖ ≤ 1, and the next step is

    Δ·0.9·‖e_n‖^(−(1 − 0.75 β)/q)·‖e_{n−1}‖^(β/q),

with q one more than the order of the estimate: the PI control of Gustafsson 1991, with the exponents of Hairer's codes,
β = 0.2 of DOPRI5 and β = 0 of DOP853 (ibid., volume II, section IV.2). The first step is chosen as ibid., volume I,
II.4, after eq. II.4.14. The controller is no part of the graph, and asks the device for one number a step."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from resode.blocks.solvers import RightHandSide, State, StepMap, Watch, combine
from resode.blocks.tableaux import Tableau
from resode.errors import InvalidInput, SolverError

SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 10.0
"""Of Hairer's: the share of the step that the error allows, and the bounds of one change."""
MEMORY = 0.2
"""β: how far the error before the last has a say, up to order 5. Above it has none: the few long steps of a method of
order 8 are too different from each other (with 0.2 the error of dopri8 is up to 4 times as large at equal NFE)."""


@dataclass(frozen=True)
class Tolerances:
    """Settings of the step-size control.

    Args:
        rtol, atol: tolerances of the local error, relative and absolute.
        max_steps: attempts at steps, accepted or not, in one solve.
        first_step: size of the first attempt; chosen from f if None.
        min_step: the smallest step; what rounding allows if None.
        error_norm: "batch", over all elements, or "sample", the largest over the samples.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 10_000
    first_step: float | None = None
    min_step: float | None = None
    error_norm: str = "batch"


@dataclass(frozen=True)
class Adaptive:
    """Steps of one embedded pair from ``t0`` to ``t1`` (either may be the larger), as the tolerances ask.

    The solve lands on t1 and on every breakpoint between; f is never evaluated beyond. After a breakpoint, where f may
    jump, the first stage is evaluated anew.
    """

    tableau: Tableau
    t0: float
    t1: float
    tolerances: Tolerances = field(default_factory=Tolerances)
    breakpoints: tuple[float, ...] = ()

    def integrate(self, f: RightHandSide, state: State, step: StepMap, watch: Watch | None = None) -> State:
        """The state at t1.

        Raises:
            InvalidInput: under ``torch.func.vmap``, whose entries would need steps of their own.
            SolverError: when the solve cannot go on: f or the state is not finite, the step underflows, or
                ``max_steps`` were not enough.
        """
        return _Solver(self, f, step, watch).run(state)

    def reversed(self) -> "Adaptive":
        return replace(self, t0=self.t1, t1=self.t0)

    def pieces(self) -> tuple[float, ...]:
        """t0, the breakpoints between (one, where several differ by rounding alone), t1."""
        width, close = self.t1 - self.t0, 1e-9 * abs(self.t1 - self.t0)
        found = [self.t0]
        for point in sorted(self.breakpoints, reverse=width < 0):
            inside = min(self.t0, self.t1) + close < point < max(self.t0, self.t1) - close
            if inside and abs(point - found[-1]) > close:
                found.append(point)
        return (*found, self.t1)


class _Solver:
    """One adaptive solve in progress."""

    def __init__(self, scheme: Adaptive, f: RightHandSide, step: StepMap, watch: Watch | None) -> None:
        self.scheme, self.f, self.step, self.watch = scheme, f, step, watch
        self.tolerances = scheme.tolerances
        self.sign = math.copysign(1.0, scheme.t1 - scheme.t0)
        self.power = step.error_order + 1
        self.memory = MEMORY if scheme.tableau.order <= 5 else 0.0
        self.attempts = 0
        self.size: float | None = self.tolerances.first_step
        self.before = 1.0  # ‖e‖ of the last accepted step
        self.reach = 0.0
        """As far as the error of the last step alone would allow the next to go."""

    def run(self, state: State) -> State:
        for start, end in pairwise(self.scheme.pieces()):
            state = self.piece(start, end, state)
        return state

    def piece(self, start: float, end: float, state: State) -> State:
        """Steps from ``start`` to ``end``, between which f does not jump."""
        f, t, first, most = self.f, start, None, LARGEST
        while t != end:
            if first is None:
                first = self._slope(t, end, state)
            if self.size is None:
                self.size = self._initial_size(t, end, state, first)
            self._require_progress(t, end, first)
            target, cut = self._target(t, end)
            f.begin_step(t, target)
            trial = self.step(f, t, target, state, first, control=True, reused=target != end)
            error = self._norm(trial.error, state, trial.state)
            self.attempts += 1
            if error <= 1.0:
                f.accept_step()
                if self.watch is not None:
                    self.watch(t, target, state)
                size = abs(target - t) * min(most, max(SMALLEST, self._factor(error)))
                # A step that was cut to land on the piece's end says nothing against the size there was.
                self.size = max(size, self.size) if cut else size
                self.reach = abs(target - t) * min(LARGEST, SAFETY * max(error, 1e-10) ** (-1.0 / self.power))
                self.before, most = max(error, 1e-4), LARGEST
                t, state, first = target, trial.state, trial.last
            else:
                f.reject_step()
                if not math.isfinite(error):
                    self._require_finite(t, target, first)
                factor = SAFETY * error ** (-1.0 / self.power) if math.isfinite(error) else 0.0
                self.size, most, self.reach = abs(target - t) * max(SMALLEST, factor), 1.0, 0.0
        return state

    def _factor(self, error: float) -> float:
        """By what the step after an accepted one of this error changes."""
        now, before = (1.0 - 0.75 * self.memory) / self.power, self.memory / self.power
        return SAFETY * max(error, 1e-10) ** -now * self.before**before

    def _slope(self, t: float, end: float, state: State) -> State:
        """f at ``t``, where a step begins that may yet be rejected: what was met at ``t`` counts all the same."""
        self.f.begin_step(t, end)
        slope = self.f(t, self.step.core(state))
        self.f.keep()
        return slope

    def _target(self, t: float, end: float) -> tuple[float, bool]:
        """Where the next attempt shall end (at ``end``, if that is near, and never just before it), and whether that
        cuts it short."""
        left = abs(end - t)
        # To come to the end the memory of the control, which is for the steps to come, need not be heeded.
        if left <= max(self.size, self.reach) * (1.0 + 1e-9):
            return end, True
        if left <= 2.0 * self.size:  # two equal steps in place of a long and a tiny one
            return t + self.sign * 0.5 * left, True
        return t + self.sign * self.size, False

    @torch.no_grad()
    def _initial_size(self, t: float, end: float, state: State, slope: State) -> float:
        """The size of the first attempt: a small step of Euler's tells how fast f changes."""
        f, width, core = self.f, abs(end - t), self.step.core(state)
        d0, d1 = self._norm(core, core, core), self._norm(slope, core, core)
        if not math.isfinite(d0 + d1):
            raise self._stuck("the state or f is not finite", t, 0.0, slope)
        h0 = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, width)
        f.begin_step(t, end)
        at = end if h0 == width else t + self.sign * h0
        change = f(at, combine(core[: f.coupled], self.sign * h0, (1.0,), (slope,)))
        d2 = self._norm(tuple(a - b for a, b in zip(change, slope, strict=True)), core, core) / h0
        fastest = max(d1, d2)
        h1 = max(1e-6, 1e-3 * h0) if fastest <= 1e-15 else (0.01 / fastest) ** (1.0 / self.power)
        # An h1 that is not a number (f was not finite there) loses to h0.
        size = min(100.0 * h0, h1 if math.isfinite(h1) and h1 > 0.0 else h0)
        return max(min(size, width), self.tolerances.min_step or 0.0)

    def _norm(self, parts: State, before: State, after: State) -> float:
        """The scaled norm of those ``parts`` that are measured, the largest of several."""
        rtol, atol = self.tolerances.rtol, self.tolerances.atol
        with torch.no_grad():
            squares = []
            for part, one, other in zip(parts[: self.f.measured], before, after, strict=False):
                if part.numel() == 0:  # an empty batch has no error
                    squares.append(part.new_zeros(()))
                    continue
                scale = torch.maximum(one.abs(), other.abs()).mul_(rtol).add_(atol)
                # 0·∞ is no number: a step to an infinite state is rejected, however small its estimate is beside it.
                squares.append(self._mean_square((part / scale).add_(scale, alpha=0.0)))
            return math.sqrt(self._number(squares[0] if len(squares) == 1 else torch.stack(squares).amax()))

    def _number(self, x: Tensor) -> float:
        try:
            return float(x)
        except RuntimeError as problem:
            if "vmap" not in str(problem):
                raise
            raise InvalidInput(
                f"{self.scheme.tableau.name} chooses its steps by the values it meets, which differ from one entry of "
                "a torch.func.vmap to the next: give the solver a number of steps (steps=8)"
            ) from problem

    def _mean_square(self, ratio: Tensor) -> Tensor:
        if self.tolerances.error_norm == "sample" and ratio.ndim > 1:
            return ratio.square().flatten(1).mean(1).amax()
        return ratio.square().mean()

    def _require_finite(self, t: float, target: float, slope: State) -> None:
        if not all(torch.isfinite(part).all() for part in slope[: self.f.measured]):
            raise self._stuck("f is not finite", t, abs(target - t), slope)

    def _require_progress(self, t: float, end: float, slope: State) -> None:
        allowed, size = self.tolerances.max_steps, self.size
        least = self.tolerances.min_step
        if self.attempts >= allowed:
            raise self._stuck(f"max_steps = {allowed} were not enough", t, size, slope)
        if least is not None and size < least:
            raise self._stuck(f"the step size fell below min_step = {least:g}", t, size, slope)
        if size < min(abs(end - t), 8.0 * math.ulp(max(abs(self.scheme.t0), abs(self.scheme.t1)))):
            raise self._stuck("the step size underflows", t, size, slope)

    def _stuck(self, why: str, t: float, size: float, slope: State) -> SolverError:
        scheme, tolerances, norm = self.scheme, self.tolerances, float(slope[0].detach().norm())
        return SolverError(
            f"{scheme.tableau.name} cannot go on at t = {t:.6g} on the way from {scheme.t0:g} to {scheme.t1:g}: {why} "
            f"(step size {size:.3g}, ‖f‖ = {norm:.3g}, {self.attempts} steps tried); f is too steep there, or not "
            f"finite: try looser tolerances than rtol = {tolerances.rtol:g}, atol = {tolerances.atol:g}, a fixed grid "
            "(rk4), smaller weights, or a norm in the branch"
        )
