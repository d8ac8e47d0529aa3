"""Multistep and implicit solvers on a fixed grid: torchdiffeq's, kept to the contract of a solve."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from resode.blocks.solvers import RightHandSide, State, StepMap, Watch
from resode.errors import InvalidInput

MULTISTEP = ("explicit_adams", "implicit_adams")
MAX_ORDER = {"explicit_adams": 5, "implicit_adams": 4}
"""For order 4, in torchdiffeq's count (one more than the explicit method's). Its default of 12 has next to no region of
stability: the errors grow as the grid is refined, to infinity."""
ITERATIONS = 20
"""Of an implicit step, at most, until they change it by less than ε^(2/3) of its type; torchdiffeq stops after 4, and
warns at fields that are mild."""


@dataclass(frozen=True)
class MultistepGrid:
    """torchdiffeq's ``method`` from point to point of a grid, begun anew at each of the ``breakpoints``.

    Adams–Bashforth (explicit) and Adams–Bashforth–Moulton (implicit, by functional iteration) of order 4, begun by
    Runge–Kutta steps: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section III.1.
    """

    method: str
    grid: tuple[float, ...]
    breakpoints: tuple[float, ...] = ()
    tableau: None = None

    def integrate(self, f: RightHandSide, state: State, step: StepMap, watch: Watch | None = None) -> State:
        """The state at the grid's end; its steps are torchdiffeq's, whatever ``step`` is."""
        if torch._C._are_functorch_transforms_active():
            raise InvalidInput(f"{self.method} does not go with torch.func's transforms: use a one-step solver (rk4)")
        for piece in self.pieces():
            state = self._solve_piece(f, state, piece)
        return state

    def _solve_piece(self, f: RightHandSide, state: State, grid: tuple[float, ...]) -> State:
        points = torch.tensor(grid, dtype=torch.float64, device=state[0].device)
        field = _Watched(f, grid)
        options = {"grid_constructor": lambda *_: points, "max_order": MAX_ORDER[self.method], "max_iters": ITERATIONS}
        tol = torch.finfo(state[0].dtype).eps ** (2 / 3)
        path = odeint(field, state, points[[0, -1]], rtol=tol, atol=tol, method=self.method, options=options)
        field.end()
        return tuple(part[-1] for part in path)

    def reversed(self) -> "MultistepGrid":
        return MultistepGrid(self.method, self.grid[::-1], self.breakpoints)

    def pieces(self) -> list[tuple[float, ...]]:
        """The grid, cut at the breakpoints."""
        close = 1e-9 * abs(self.grid[-1] - self.grid[0])
        inner = range(1, len(self.grid) - 1)
        cuts = [i for i in inner if any(abs(self.grid[i] - point) <= close for point in self.breakpoints)]
        return [self.grid[a : b + 1] for a, b in pairwise([0, *cuts, len(self.grid) - 1])]


class _Watched:
    """``f`` as torchdiffeq sees it, told of each step by torchdiffeq's callback."""

    def __init__(self, f: RightHandSide, grid: tuple[float, ...]) -> None:
        self.f, self.steps = f, pairwise(grid)
        self.first, self.last = min(grid), max(grid)
        self.began = False

    def __call__(self, t: Tensor, state: State) -> State:
        # torchdiffeq rounds the time to the state's type, and f may not exist beyond the ends.
        return self.f(min(max(float(t), self.first), self.last), state)

    def callback_step(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        self.end()
        self.f.begin_step(*next(self.steps))
        self.began = True

    def end(self) -> None:
        """The step that was begun is done."""
        if self.began:
            self.f.accept_step()
