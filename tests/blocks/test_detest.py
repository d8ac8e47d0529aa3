"""The error control on DETEST: Hull, Enright, Fellen & Sedgwick 1972, Comparing numerical methods for ordinary
differential equations, SIAM J. Numer. Anal. 9, classes A (single equations) and B (small systems), all on [0, 20].

The error of a solve is the largest difference to the solution, over its components and over the ends of all steps:
at t = 20 alone most of these solutions have decayed, and the errors with them.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.special import ellipj
from torchdiffeq import odeint

from resode.blocks.control import Adaptive, Tolerances
from resode.blocks.solvers import RungeKutta, Solve
from resode.blocks.tableaux import TABLEAUX
from resode.layers.context import SolveContext

END = 20.0


def stack(*parts):
    return torch.stack(parts, -1)


def predators(t, y):
    a, b = y.unbind(-1)
    return stack(2.0 * (a - a * b), -(b - a * b))


REACTION = torch.tensor([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def nonlinear_reaction(t, y):
    a, b, _ = y.unbind(-1)
    return stack(-a, a - b**2, b**2)


def torus(t, y):
    a, b, c = y.unbind(-1)
    r = (a**2 + b**2).sqrt()
    return stack(-b - a * c / r, a - b * c / r, a / r)


def rigid_body(t, y):
    a, b, c = y.unbind(-1)
    return stack(b * c, -a * c, -0.51 * a * b)


PROBLEMS = {
    "A1": (lambda t, y: -y, [1.0]),
    "A2": (lambda t, y: -(y**3) / 2.0, [1.0]),
    "A3": (lambda t, y: y * math.cos(t), [1.0]),
    "A4": (lambda t, y: y / 4.0 * (1.0 - y / 20.0), [1.0]),
    "A5": (lambda t, y: (y - t) / (y + t), [4.0]),
    "B1": (predators, [1.0, 3.0]),
    "B2": (lambda t, y: y @ REACTION, [2.0, 0.0, 1.0]),
    "B3": (nonlinear_reaction, [1.0, 0.0, 0.0]),
    "B4": (torus, [3.0, 0.0, 0.0]),
    "B5": (rigid_body, [0.0, 1.0, 1.0]),
}
CLASSES = {name: [problem for problem in PROBLEMS if problem[0] == name] for name in "AB"}
CLOSED = {
    "A1": lambda t: np.exp(-t)[None],
    "A2": lambda t: ((t + 1.0) ** -0.5)[None],
    "A3": lambda t: np.exp(np.sin(t))[None],
    "A4": lambda t: (20.0 / (1.0 + 19.0 * np.exp(-t / 4.0)))[None],
    "B2": lambda t: np.stack([expm(REACTION.numpy() * s) @ PROBLEMS["B2"][1] for s in t], 1),
    "B5": lambda t: np.stack(ellipj(t, 0.51)[:3]),
}


@cache
def tight(problem):
    """scipy's DOP853 at a tolerance of 1e-13, at any time."""
    f, start = PROBLEMS[problem]
    solved = solve_ivp(
        lambda t, y: f(t, torch.from_numpy(y)).numpy(),
        (0.0, END), start, method="DOP853", rtol=1e-13, atol=1e-13, dense_output=True,
    )  # fmt: skip
    return solved.sol


def error(problem, path):
    """The largest error over the ``path`` of pairs (t, state)."""
    times = np.array([t for t, _ in path])
    found = np.stack([y.numpy() for _, y in path], 1)
    return np.abs(found - CLOSED.get(problem, tight(problem))(times)).max()


@cache
def ours(problem, solver, tol):
    """Evaluations and error of our solve."""
    f, start = PROBLEMS[problem]
    tableau, path = TABLEAUX[solver], []
    solve = Solve(f, SolveContext(0.0, END))
    scheme = Adaptive(tableau, 0.0, END, Tolerances(tol, tol))
    y = torch.tensor(start, dtype=torch.float64)
    (y,) = scheme.integrate(solve, (y,), RungeKutta(tableau), lambda t, _, state: path.append((t, state[0])))
    return solve.stats.nfe_forward, error(problem, [*path, (END, y)])


class Watched:
    """A field that counts its evaluations, and is told of torchdiffeq's steps."""

    def __init__(self, f):
        self.f, self.count, self.path = f, 0, []

    def __call__(self, t, y):
        self.count += 1
        return self.f(float(t), y)

    def callback_accept_step(self, t, y, dt):
        self.path.append((float(t), y))


@cache
def torchdiffeqs(problem, solver, tol):
    """Evaluations and error of torchdiffeq's solve, made to land on the end (it would interpolate, worse)."""
    f, start = PROBLEMS[problem]
    watched, times = Watched(f), torch.tensor([0.0, END], dtype=torch.float64)
    y = torch.tensor(start, dtype=torch.float64)
    path = odeint(watched, y, times, rtol=tol, atol=tol, method=solver, options={"step_t": times[1:]})
    return watched.count, error(problem, [*watched.path, (END, path[-1])])


def decades(first, last):
    return [10.0**-k for k in range(first, last + 1)]


def slope(tolerances, errors):
    return np.polyfit(np.log(tolerances), np.log(errors), 1)[0]


RANGES = {"bosh3": decades(3, 7), "tsit5": decades(3, 9), "dopri5": decades(3, 9), "dopri8": decades(3, 10)}


@pytest.mark.parametrize("problem", CLOSED)
def test_the_closed_forms_are_the_solutions(problem):
    times = np.linspace(0.0, END, 9)
    np.testing.assert_allclose(CLOSED[problem](times), tight(problem)(times), rtol=0, atol=1e-11)


@pytest.mark.parametrize("solver", RANGES)
@pytest.mark.parametrize("name", CLASSES)
def test_the_global_error_is_proportional_to_the_tolerance(name, solver):
    """The slope of log error, averaged over the problems of a class, against log tolerance."""
    errors = [[ours(problem, solver, tol)[1] for tol in RANGES[solver]] for problem in CLASSES[name]]
    assert 0.8 < slope(RANGES[solver], np.exp(np.log(errors).mean(0))) < 1.2
    # One problem alone scatters: an error is a sum that may cancel at one tolerance and not at the next.
    assert all(0.7 < slope(RANGES[solver], each) < 1.3 for each in errors)


@pytest.mark.parametrize("solver", ["bosh3", "dopri5", "dopri8"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_error_is_at_most_twice_torchdiffeqs_at_equal_cost(problem, solver):
    """torchdiffeq's error is interpolated, in the logarithms, to our evaluations."""
    tolerances = RANGES[solver][:-1]
    theirs = np.log([torchdiffeqs(problem, solver, tol) for tol in tolerances])
    found = np.log([ours(problem, solver, tol) for tol in tolerances])
    comparable = (theirs[0, 0] <= found[:, 0]) & (found[:, 0] <= theirs[-1, 0])
    ratios = np.exp(found[:, 1] - np.interp(found[:, 0], theirs[:, 0], theirs[:, 1]))[comparable]
    assert len(ratios) >= 2
    assert np.exp(np.log(ratios).mean()) < 1.25
    # From 1e-4 on. At 1e-3 these solves have ten to thirty steps, each a large part of the way: neither error follows
    # its estimate there, and dopri5 is at 2.2 (A1) and 3.2 (B4).
    assert ratios[np.array(tolerances)[comparable] < 1e-3].max() < 2.0
    assert ratios.max() < 3.5
