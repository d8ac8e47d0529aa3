"""The ODE block: h(t1) from h(t0) = x, where dh/dt = f(t, h)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.blocks.adjoint import Adjoint
from resode.blocks.checkpoint import Checkpoint
from resode.blocks.compiled import COMPILE_MODES, Compiler
from resode.blocks.control import Adaptive, Tolerances
from resode.blocks.foreign import refuse_foreign
from resode.blocks.gradients import Mode, integrate, wide
from resode.blocks.multistep import MULTISTEP, MultistepGrid
from resode.blocks.reversible import COUPLING, Reversible, ReversibleStep
from resode.blocks.settings import TOLERANCE, check_count, check_extras, check_solver, grid_steps
from resode.blocks.solvers import (
    FixedGrid,
    RungeKutta,
    Scheme,
    Solve,
    SolveStats,
    State,
    check_breakpoints,
    uniform_grid,
)
from resode.blocks.synchronized import refuse_synchronized
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.blocks.transport import Transport, collecting
from resode.errors import InvalidInput, choose
from resode.layers.context import SolveContext
from resode.layers.layout import gradient_alike
from resode.layers.norm import BatchNorm, index_statistics

ADAPTIVE_KNOTS = 9
"""Knots of the running statistics where no fixed grid suggests their number."""


class ODEBlock(nn.Module):
    """The flow of a vector field: x ↦ h(t1), with dh/dt = f(t, h) and h(t0) = x.

    Args:
        branch: f, any module called as ``branch(t, h)`` that keeps the shape of h; h is (B, C) or (B, C, H, W). A
            branch whose weights jump or bend lists the times in an attribute ``breakpoints``: fixed grids must have
            them as points, adaptive solves land on them. The block gives the branch its interval (the knots of batch
            norms, the span of weights that vary): blocks that share a branch must share [t0, t1], too.
        solver: an explicit Runge–Kutta method ("euler", "midpoint", "heun", "ralston", "rk4", "rk4-38", "bosh3",
            "tsit5", "dopri5", "dopri8", "adaptive_heun"; see ``blocks.tableaux``) or "explicit_adams",
            "implicit_adams" (torchdiffeq's).
        steps: number of equal steps of a fixed grid. If None, the last five of the Runge–Kutta methods, which are
            embedded pairs, choose their steps by an error control, and the others make 8.
        rtol, atol: tolerances of an adaptive solve (1e-3 each if None).
        t0, t1: ends of the interval of integration.
        gradient: "backprop", "checkpoint", "reversible" or "adjoint" (see ``blocks.gradients``).
        compile: run each step as one compiled graph (see ``blocks.compiled``); True, or a mode of torch.compile. In a
            mode of CUDA graphs ("reduce-overhead", "max-autotune") call ``begin_graphs`` at the start
            of each training step, as ``fit`` does.
        mask_intervals: dropout masks are drawn once for each of this many equal intervals of [t0, t1]. The default
            of 1, once per solve, is another regularizer than a discrete net's: with N intervals the block is the
            twin of N residual blocks.
        knots: number of times by which the running statistics of batch norms are indexed; by default the points of
            the fixed grid (steps + 1), or 9.
        max_steps, first_step, min_step, error_norm: of an adaptive solve (see ``blocks.control.Tolerances``).
        seminorm: leave the parameters' part of an adjoint solve out of its error control (Kidger et al. 2021).
        coupling: λ of the reversible form (see ``blocks.reversible``).
        extra_channels: channels of zeros that are added to x, integrated along, and left out of the result (Dupont
            et al. 2019, arXiv 1904.01681); the branch has that many channels more than x.
        kinetic, jacobian: weights of the penalties of ``blocks.transport``, which a trainer collects.
        steer: in training, integrate to a random end, uniform in [t1 − steer, t1 + steer] (STEER: Ghosh et al. 2020,
            arXiv 2006.10711).

    ``block.stats`` holds the evaluations and steps of the last solve. The settings are plain attributes, and may be
    changed on a trained block; :func:`solver_settings` does so for a while. Within a model under torch.compile the
    block is a break of the graph, and compiles its own steps.

    Raises:
        InvalidInput: for settings that make no sense, a branch that changes the shape (or, when run, the state it is
            given), or one that holds torch's own dropout or batch norm, or an ODE block.
        SolverError: in the forward pass, when an adaptive solve cannot go on.
    """

    def __init__(
        self,
        branch: nn.Module,
        solver: str = "rk4",
        steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        t0: float = 0.0,
        t1: float = 1.0,
        gradient: str = "backprop",
        compile: bool | str = False,
        *,
        mask_intervals: int = 1,
        knots: int | None = None,
        max_steps: int = 10_000,
        first_step: float | None = None,
        min_step: float | None = None,
        error_norm: str = "batch",
        seminorm: bool = True,
        coupling: float = COUPLING,
        extra_channels: int = 0,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        steer: float = 0.0,
    ) -> None:
        super().__init__()
        self.solver, self.steps, self.rtol, self.atol = solver, steps, rtol, atol
        self.t0, self.t1, self.gradient = t0, t1, gradient
        self.max_steps, self.first_step, self.min_step, self.error_norm = max_steps, first_step, min_step, error_norm
        self.seminorm, self.coupling = seminorm, coupling
        self.compile_mode = "default" if compile is True else compile or None
        self.mask_intervals, self.extra_channels = mask_intervals, extra_channels
        self.kinetic, self.jacobian, self.steer = kinetic, jacobian, steer
        self.check_settings()
        check_count(mask_intervals, "mask_intervals")
        if knots is None:
            knots = ADAPTIVE_KNOTS if self.grid_steps is None else self.grid_steps + 1
        check_count(knots, "knots")
        if not isinstance(branch, nn.Module):
            raise InvalidInput(f"the branch is a {type(branch).__name__}: a torch.nn.Module is expected")
        _refuse_other_shape(branch)
        refuse_foreign(branch)
        _refuse_nested(branch)
        self.branch = branch
        self.stats = SolveStats()
        self._compiler = Compiler()
        index_statistics(branch, uniform_grid(t0, t1, knots - 1) if knots > 1 else (t0,))
        if hasattr(branch, "set_span"):  # weights that vary with t
            branch.set_span(t0, t1)
        if self.steer and self.breakpoints and self.grid_steps is not None:
            raise InvalidInput(
                f"steer is {steer:g}, and f (or its masks) jumps at t = {self.breakpoints[0]:g}: no fixed grid to a "
                "random end has them as points; use an adaptive solver (dopri5), or steer=0"
            )
        self.scheme()  # a grid that steps over a breakpoint is refused here, before anything is computed

    def check_settings(self) -> None:
        """Check the present settings, which may have been changed since the block was made.

        Raises:
            InvalidInput: when they make no sense.
        """
        check_solver(
            self.solver,
            self.steps,
            self.rtol,
            self.atol,
            self.t0,
            self.t1,
            self.gradient,
            max_steps=self.max_steps,
            first_step=self.first_step,
            min_step=self.min_step,
            error_norm=self.error_norm,
            coupling=self.coupling,
        )
        if self.compile_mode is not None:
            choose(self.compile_mode, COMPILE_MODES, "mode of compile")
        check_extras(self.extra_channels, self.kinetic, self.jacobian, self.steer, self.t0, self.t1)

    @property
    def grid_steps(self) -> int | None:
        """Steps of the fixed grid; None for an adaptive solve."""
        return grid_steps(self.solver, self.steps)

    def forward(self, x: Tensor) -> Tensor:
        """h(t1), of the shape of ``x``: (B, C) or (B, C, H, W).

        Within ``torch.export`` the steps of a fixed grid become operations of the exported graph.

        Raises:
            InvalidInput: for settings that make no sense, a state of whole numbers, or an adaptive solve within
                ``torch.export``.
            SolverError: when an adaptive solve cannot go on.
        """
        if torch.compiler.is_exporting():
            if self.grid_steps is None:
                raise InvalidInput(
                    f"{self.solver} chooses its steps by the values it meets, which an exported graph cannot: export "
                    "the block with a fixed grid, solver_settings(model, steps=8)"
                )
            return self._forward(x, None)
        if torch.compiler.is_compiling():
            return _outside_graphs(self, x)
        return self._forward(x, self.compile_mode)

    def _forward(self, x: Tensor, compile_mode: str | None) -> Tensor:
        collected = collecting() if self.kinetic or self.jacobian else None
        with self._solving(x, compile_mode, penalized=collected is not None) as f:
            scheme, state = self.scheme(self._end()), (self.augment(x),)
            if collected is not None:
                state = (*state, x.new_zeros((), dtype=wide(x.dtype)))
            end = self._integrate(f, scheme, state)
        if collected is not None:
            collected.append(end[1])
        out = gradient_alike(end[0]).to(x.dtype)
        return out[:, : x.shape[1]] if self.extra_channels else out

    def trajectory(self, x: Tensor, times: Sequence[float]) -> Tensor:
        """The states at ``times``, differentiable: (T, *x.shape), with the extra channels if there are any.

        On a fixed grid the solve is the one of :meth:`forward`; a time between two grid points is reached by one
        shortened step from the point before it, which leaves the solve itself, and the statistics it gathers, as they
        are. An adaptive solve lands on every one of the times. The reversible and the multistep solvers begin anew at
        each of them.

        Raises:
            InvalidInput: for times outside [t0, t1], decreasing, or none.
            SolverError: when an adaptive solve cannot go on.
        """
        times = [float(t) for t in times]
        if not times or not all(a <= b for a, b in pairwise([self.t0, *times, self.t1])):
            raise InvalidInput(
                f"times of a trajectory must lie in [{self.t0:g}, {self.t1:g}] and not decrease; got {times or 'none'}"
            )
        with self._solving(x, self.compile_mode) as f:
            f.context.whole = times[-1] == self.t1
            states = self._states(f, self.scheme(), (self.augment(x),), times)
            return torch.stack([h.to(x.dtype) for (h,) in states])

    def inverse(self, y: Tensor) -> Tensor:
        """h(t0) with h(t1) = ``y``, by the same solver from t1 to t0: to the solver's accuracy, what was x.

        Args:
            y: of the shape of x, with the extra channels if there are any (:meth:`trajectory` gives them).

        Gathers no statistics. In training each solve draws masks of its own: invert in evaluation mode.

        Raises:
            SolverError: when an adaptive solve cannot go on.
        """
        with self._solving(y, self.compile_mode) as f:
            f.context.recording = False
            (h,) = self._integrate(f, self.scheme().reversed(), (y.to(wide(y.dtype)),))
        return h.to(y.dtype)

    @torch.no_grad()
    def accepted_grid(self, x: Tensor) -> tuple[float, ...]:
        """t0 and the ends of the steps that an adaptive solve from ``x`` accepts; of a fixed grid, its points.

        Gathers no statistics.

        Raises:
            InvalidInput: for a multistep solver, which has no grid of its own.
            SolverError: when the solve cannot go on.
        """
        if self.solver in MULTISTEP:
            raise InvalidInput(f"{self.solver} has no grid of accepted steps: choose from {', '.join(TABLEAUX)}")
        points = [self.t0]
        with self._solving(x, None) as f:
            f.context.recording = False
            step, state = RungeKutta(TABLEAUX[self.solver]), (self.augment(x),)
            if self.gradient == "reversible":  # another scheme, of two coupled states, whose errors are its own
                step, state = ReversibleStep(TABLEAUX[self.solver], self.coupling), (*state, *state)
            self.scheme().integrate(f, state, step, lambda start, end, state: points.append(end))
        return tuple(points)

    def _states(self, f: Solve, scheme: Scheme, state: State, times: list[float]) -> Iterator[State]:
        grid, close = getattr(scheme, "grid", None), 1e-9 * (self.t1 - self.t0)
        if grid is None:
            now = self.t0
            for time in times:
                if time > now:
                    state, now = self._integrate(f, self._adaptive(now, time), state), time
                yield state
            return
        at = 0
        for time in times:
            last = max(i for i, point in enumerate(grid) if point <= time + close)
            if last > at:
                state, at = self._integrate(f, self._on_grid(grid[at : last + 1]), state), last
            if time - grid[last] > close:
                f.context.recording = False
                yield self._integrate(f, self._on_grid((grid[last], time)), state)
                f.context.recording = True
            else:
                yield state

    def scheme(self, end: float | None = None) -> Scheme:
        """The grid and method of a solve with the present settings, to t1 (or another ``end``).

        Raises:
            InvalidInput: when they make no sense, a fixed grid steps over a breakpoint, or synchronized batch norms
                would be trained in a solve that chooses its steps.
        """
        self.check_settings()
        end, steps = self.t1 if end is None else end, self.grid_steps
        if steps is None:
            refuse_synchronized(self.branch)
            return self._adaptive(self.t0, end)
        grid = uniform_grid(self.t0, end, steps)
        check_breakpoints(grid, self.breakpoints)
        return self._on_grid(grid)

    def _on_grid(self, grid: tuple[float, ...]) -> Scheme:
        if self.solver in MULTISTEP:
            return MultistepGrid(self.solver, grid, self.breakpoints)
        return FixedGrid(TABLEAUX[self.solver], grid)

    def _adaptive(self, t0: float, t1: float) -> Adaptive:
        rtol, atol = (TOLERANCE if tol is None else tol for tol in (self.rtol, self.atol))
        tolerances = Tolerances(rtol, atol, self.max_steps, self.first_step, self.min_step, self.error_norm)
        return Adaptive(TABLEAUX[self.solver], t0, t1, tolerances, self.breakpoints)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times where the branch's weights or (where layers that may draw them are training) its masks jump."""
        own = tuple(float(t) for t in getattr(self.branch, "breakpoints", ()))
        # A batch norm draws nothing: alone in training it is being recalibrated.
        layers = (module for module in self.branch.modules() if not isinstance(module, BatchNorm))
        drawing = self.mask_intervals > 1 and any(layer.training for layer in layers)
        masks = uniform_grid(self.t0, self.t1, self.mask_intervals)[1:-1] if drawing else ()
        return tuple(sorted({*own, *masks}))

    def _end(self) -> float:
        """Where the present solve ends."""
        if not (self.training and self.steer):
            return self.t1
        return self.t1 + self.steer * (2.0 * float(torch.rand(())) - 1.0)

    @contextmanager
    def _solving(self, x: Tensor, compile_mode: str | None, penalized: bool = False) -> Iterator[Solve]:
        """A solve with its context; at its end the statistics met are absorbed, once."""
        if not (x.is_floating_point() or x.is_complex()):
            raise InvalidInput(
                f"a state of {x.dtype} cannot follow an ODE: every evaluation would be rounded to whole numbers; give "
                "the block x.float()"
            )
        context = SolveContext(
            self.t0, self.t1, mask_intervals=self.mask_intervals, detached=self.gradient != "backprop"
        )
        # The state is at least float32, whatever the branch computes in: sums of small increments need it.
        solve = Solve(self.branch, context, None if x.dtype == wide(x.dtype) else x.dtype)
        if penalized:
            solve.integrands = Transport(context, self.kinetic, self.jacobian)
        if compile_mode is not None:
            self._compiler.mode = compile_mode
            solve.compiler = self._compiler
        self.stats = solve.stats
        yield solve
        context.commit()

    def _integrate(self, f: Solve, scheme: Scheme, state: State) -> State:
        return integrate(f, scheme, state, self._mode(), [p for p in self.branch.parameters() if p.requires_grad])

    def _mode(self) -> Mode | None:
        """The gradient mode of one solve; None for backpropagation."""
        if self.gradient == "backprop":
            return None
        if self.gradient == "checkpoint":
            return Checkpoint()
        return Reversible(self.coupling) if self.gradient == "reversible" else Adjoint(self.seminorm)

    def augment(self, x: Tensor) -> Tensor:
        """The state at t0: ``x``, in at least float32, with the extra channels, of zeros."""
        x = x.to(wide(x.dtype))
        if not self.extra_channels:
            return x
        if x.ndim < 2:
            raise InvalidInput(f"extra_channels needs a state (B, C, …), and this one has the shape {tuple(x.shape)}")
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.extra_channels))

    def extra_repr(self) -> str:
        steps = self.grid_steps
        control = f"rtol={self.rtol}, atol={self.atol}" if steps is None else f"steps={steps}"
        said = f"solver={self.solver!r}, {control}, t0={self.t0:g}, t1={self.t1:g}, gradient={self.gradient!r}"
        return said + (f", compile={self.compile_mode!r}" if self.compile_mode else "")


@torch.compiler.disable
def _outside_graphs(block: ODEBlock, x: Tensor) -> Tensor:
    # The user compiles the model around the block: the block's steps are compiled, each by itself.
    return block._forward(x, block.compile_mode or "default")


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


def ode_blocks(model: nn.Module) -> dict[str, ODEBlock]:
    """The ODE blocks of ``model``, each once, by their names in it."""
    return {name: block for name, block in model.named_modules() if isinstance(block, ODEBlock)}


SETTINGS = (
    "solver",
    "steps",
    "rtol",
    "atol",
    "gradient",
    "max_steps",
    "first_step",
    "min_step",
    "error_norm",
    "compile_mode",
)
OF_ADAPTIVE = ("rtol", "atol", "first_step", "min_step")
"""Settings that mean nothing to a fixed grid."""


@contextmanager
def solver_settings(model: nn.Module, **settings: object) -> Iterator[None]:
    """Evaluate ``model`` with other settings of its ODE blocks (solver, steps, rtol, …), then restore.

    An embedded pair that is named alone chooses its steps; with ``steps`` the tolerances held for an error control mean
    nothing, and with tolerances alone the steps.

    Raises:
        InvalidInput: for a name that is not a setting, or (when evaluated) a value that makes no sense.
    """
    for name in settings:
        choose(name, SETTINGS, "setting of an ODE block")
    solver, steps = settings.get("solver"), settings.get("steps")
    if steps is not None or (solver is not None and solver not in ADAPTIVE):
        settings = {**dict.fromkeys(OF_ADAPTIVE), **settings}
    elif solver is not None or {"rtol", "atol"} & {name for name, value in settings.items() if value is not None}:
        settings = {"steps": None, **settings}
    blocks = list(ode_blocks(model).values())
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
