"""The ODE block: h(t1) from h(t0) = x, where dh/dt = f(t, h)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from resode.blocks.adaptive import ADAPTIVE, Adaptive
from resode.blocks.foreign import refuse_foreign
from resode.blocks.gradients import GRADIENTS, integrate
from resode.blocks.solvers import TABLEAUX, FixedGrid, Scheme, Solve, SolveStats, check_breakpoints, uniform_grid
from resode.errors import InvalidInput, choose, positive
from resode.layers.context import SolveContext
from resode.layers.norm import index_statistics

SOLVERS = (*TABLEAUX, *ADAPTIVE)
TOLERANCE = 1e-3
ADAPTIVE_KNOTS = 9
"""Knots of the running statistics where no fixed grid suggests their number."""


def check_solver(
    solver: str,
    steps: int,
    rtol: float | None = None,
    atol: float | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    gradient: str = "backprop",
) -> None:
    """Check the settings of a solve, before anything is computed.

    Raises:
        InvalidInput: for an unknown solver or gradient mode, fewer than 1 step, tolerances that are not above 0 or
            not for this solver, or t1 ≤ t0.
    """
    choose(solver, SOLVERS, "solver")
    choose(gradient, GRADIENTS, "gradient mode")
    _check_count(steps, "steps")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is None:
            continue
        positive(value, name)
        if solver in TABLEAUX:
            raise InvalidInput(
                f"{name} is {value:g}, and {solver} makes fixed steps: leave {name} out, or choose one of "
                f"{', '.join(ADAPTIVE)}"
            )
    if not -math.inf < t0 < t1 < math.inf:
        raise InvalidInput(f"an ODE block from t0 = {t0:g} to t1 = {t1:g}: t1 must be the larger, and both finite")


def _check_count(value: int, what: str) -> None:
    if not isinstance(value, int) or value < 1:
        raise InvalidInput(f"{what} is {value!r}: a whole number of at least 1 is expected")


class ODEBlock(nn.Module):
    """The flow of a vector field: x ↦ h(t1), with dh/dt = f(t, h) and h(t0) = x.

    Args:
        branch: f, any module called as ``branch(t, h)`` that keeps the shape of h; h is (B, C) or (B, C, H, W). A
            branch whose weights jump lists the times in an attribute ``breakpoints``: fixed grids must have them as
            points, adaptive solves land on them.
        solver: "euler", "midpoint", "heun", "rk4" on a fixed grid, or "dopri5", "bosh3", "dopri8", "adaptive_heun"
            with an error control over the whole batch.
        steps: number of equal steps of a fixed grid.
        rtol, atol: tolerances of an adaptive solver (1e-3 each if None).
        t0, t1: ends of the interval of integration.
        gradient: "backprop" or "adjoint" (see ``resode.blocks.gradients``).
        mask_intervals: dropout masks are drawn once for each of this many equal intervals of [t0, t1]. The default
            of 1, once per solve, is another regularizer than a discrete net's: with N intervals the block is the
            twin of N residual blocks.
        knots: number of times by which the running statistics of batch norms are indexed; by default the points of
            the fixed grid (steps + 1), or 9.

    ``block.stats`` holds the evaluations and steps of the last solve. The settings are plain attributes, and may be
    changed on a trained block; :func:`solver_settings` does so for a while.

    Raises:
        InvalidInput: for settings that make no sense, a branch that changes the shape (or, when run, the state it is
            given), or one that holds torch's own dropout or batch norm, or an ODE block.
        SolverError: in the forward pass, when an adaptive solve cannot go on.
    """

    def __init__(
        self,
        branch: nn.Module,
        solver: str = "rk4",
        steps: int = 8,
        rtol: float | None = None,
        atol: float | None = None,
        t0: float = 0.0,
        t1: float = 1.0,
        gradient: str = "backprop",
        *,
        mask_intervals: int = 1,
        knots: int | None = None,
    ) -> None:
        super().__init__()
        check_solver(solver, steps, rtol, atol, t0, t1, gradient)
        _check_count(mask_intervals, "mask_intervals")
        if knots is None:
            knots = steps + 1 if solver in TABLEAUX else ADAPTIVE_KNOTS
        _check_count(knots, "knots")
        if not isinstance(branch, nn.Module):
            raise InvalidInput(f"the branch is a {type(branch).__name__}: a torch.nn.Module is expected")
        _refuse_other_shape(branch)
        refuse_foreign(branch)
        _refuse_nested(branch)
        self.branch = branch
        self.solver, self.steps, self.rtol, self.atol = solver, steps, rtol, atol
        self.t0, self.t1, self.gradient = t0, t1, gradient
        self.mask_intervals = mask_intervals
        self.stats = SolveStats()
        index_statistics(branch, uniform_grid(t0, t1, knots - 1) if knots > 1 else (t0,))
        self.scheme()  # a grid that steps over a breakpoint is refused here, before anything is computed

    def forward(self, x: Tensor) -> Tensor:
        """h(t1), of the shape of ``x``: (B, C) or (B, C, H, W)."""
        with self._solving() as f:
            return self._integrate(f, self.scheme(), x)

    def trajectory(self, x: Tensor, times: Sequence[float]) -> Tensor:
        """The states at ``times``, differentiable: (T, *x.shape).

        On a fixed grid the solve is the one of :meth:`forward`; a time between two grid points is reached by one
        shortened step from the point before it, which leaves the solve itself, and the statistics it gathers, as they
        are. An adaptive solve lands on every one of the times.

        Raises:
            InvalidInput: for times outside [t0, t1], decreasing, or none.
        """
        times = [float(t) for t in times]
        if not times or not all(a <= b for a, b in pairwise([self.t0, *times, self.t1])):
            raise InvalidInput(
                f"times of a trajectory must lie in [{self.t0:g}, {self.t1:g}] and not decrease; got {times or 'none'}"
            )
        with self._solving() as f:
            f.context.whole = times[-1] == self.t1
            return torch.stack(list(self._states(f, self.scheme(), x, times)))

    def _states(self, f: Solve, scheme: Scheme, h: Tensor, times: list[float]) -> Iterator[Tensor]:
        if isinstance(scheme, FixedGrid):
            grid, at = scheme.grid, 0
            close = 1e-9 * (self.t1 - self.t0)
            for time in times:
                last = max(i for i, point in enumerate(grid) if point <= time + close)
                if last > at:
                    h, at = self._integrate(f, FixedGrid(scheme.tableau, grid[at : last + 1]), h), last
                if time - grid[last] > close:
                    f.context.recording = False
                    yield self._integrate(f, FixedGrid(scheme.tableau, (grid[last], time)), h)
                    f.context.recording = True
                else:
                    yield h
        else:
            now = self.t0
            for time in times:
                if time > now:
                    h, now = self._integrate(f, self._adaptive(now, time), h), time
                yield h

    def scheme(self) -> Scheme:
        """The grid and method of a solve with the present settings.

        Raises:
            InvalidInput: when they make no sense, or a fixed grid steps over a breakpoint.
        """
        check_solver(self.solver, self.steps, self.rtol, self.atol, self.t0, self.t1, self.gradient)
        if self.solver in ADAPTIVE:
            return self._adaptive(self.t0, self.t1)
        grid = uniform_grid(self.t0, self.t1, self.steps)
        check_breakpoints(grid, self.breakpoints)
        return FixedGrid(TABLEAUX[self.solver], grid)

    def _adaptive(self, t0: float, t1: float) -> Adaptive:
        rtol, atol = (TOLERANCE if tol is None else tol for tol in (self.rtol, self.atol))
        return Adaptive(self.solver, t0, t1, rtol, atol, self.breakpoints)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times where the branch's weights or (in training) its masks jump."""
        own = tuple(float(t) for t in getattr(self.branch, "breakpoints", ()))
        masks = uniform_grid(self.t0, self.t1, self.mask_intervals)[1:-1] if self.training else ()
        return tuple(sorted({*own, *masks}))

    @contextmanager
    def _solving(self) -> Iterator[Solve]:
        """A solve with its context; at its end the statistics met are absorbed, once."""
        context = SolveContext(
            self.t0, self.t1, mask_intervals=self.mask_intervals, detached=self.gradient != "backprop"
        )
        solve = Solve(self.branch, context)
        self.stats = solve.stats
        yield solve
        context.commit()

    def _integrate(self, f: Solve, scheme: Scheme, h: Tensor) -> Tensor:
        return integrate(f, scheme, h, self.gradient, [p for p in self.branch.parameters() if p.requires_grad])

    def extra_repr(self) -> str:
        control = f"steps={self.steps}" if self.solver in TABLEAUX else f"rtol={self.rtol}, atol={self.atol}"
        return f"solver={self.solver!r}, {control}, t0={self.t0:g}, t1={self.t1:g}, gradient={self.gradient!r}"


def _refuse_other_shape(branch: nn.Module) -> None:
    # Ours say what they do; a foreign branch is checked at its first evaluation.
    channels, out, stride = (getattr(branch, name, None) for name in ("channels", "out_channels", "stride"))
    if channels is not None and out is not None and (channels != out or stride not in (None, 1)):
        raise InvalidInput(
            f"the branch turns {channels} channels into {out} with stride {stride}: the vector field of an ODE must "
            "keep the shape; change the shape in a transition before or after the block"
        )


def _refuse_nested(branch: nn.Module) -> None:
    if any(isinstance(layer, ODEBlock) for layer in branch.modules()):
        raise InvalidInput("the branch holds an ODE block: a solve within each evaluation of a solve is not supported")


@contextmanager
def solver_settings(model: nn.Module, **settings: object) -> Iterator[None]:
    """Evaluate ``model`` with other settings of its ODE blocks (solver, steps, rtol, atol, gradient), then restore.

    Raises:
        InvalidInput: for a name that is not a setting, or (when evaluated) a value that makes no sense.
    """
    for name in settings:
        choose(name, ("solver", "steps", "rtol", "atol", "gradient"), "setting of an ODE block")
    if settings.get("solver") in TABLEAUX:  # tolerances held for an adaptive solver mean nothing to it
        settings = {"rtol": None, "atol": None, **settings}
    blocks = [block for block in model.modules() if isinstance(block, ODEBlock)]
    before = [{name: getattr(block, name) for name in settings} for block in blocks]
    try:
        for block in blocks:
            for name, value in settings.items():
                setattr(block, name, value)
        yield
    finally:
        for block, held in zip(blocks, before, strict=True):
            for name, value in held.items():
                setattr(block, name, value)
