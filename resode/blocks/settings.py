"""The settings of a solve, checked before anything is computed."""

import math

from resode.blocks.multistep import MULTISTEP
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.errors import InvalidInput, choose, positive

SOLVERS = (*TABLEAUX, *MULTISTEP)
GRADIENTS = ("backprop", "checkpoint", "reversible", "adjoint")
ERROR_NORMS = ("batch", "sample")
STEPS = 8
"""Steps of a fixed grid, where none are given."""
TOLERANCE = 1e-3
"""Tolerances of an adaptive solve, where none are given."""


def is_adaptive(solver: str, steps: int | None) -> bool:
    """Whether a solve chooses its steps by an error control: an embedded pair without a number of steps."""
    return solver in ADAPTIVE and steps is None


def is_one_step(solver: str) -> bool:
    """Whether each step follows from the state before it alone, as those of a Runge–Kutta method do."""
    return solver not in MULTISTEP


def grid_steps(solver: str, steps: int | None) -> int | None:
    """Steps of the fixed grid that a solve makes; None if it chooses them."""
    if is_adaptive(solver, steps):
        return None
    return STEPS if steps is None else steps


def check_solver(
    solver: str,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    gradient: str = "backprop",
    *,
    max_steps: int = 1,
    first_step: float | None = None,
    min_step: float | None = None,
    error_norm: str = "batch",
    coupling: float = 1.0,
) -> None:
    """Check the settings of a solve.

    Raises:
        InvalidInput: for an unknown solver, gradient mode or error norm, fewer than 1 step, tolerances or step sizes
            that are not above 0 or not for this solve, a first step below the smallest, a gradient mode that the
            solver does not have, a coupling outside (0, 1], or t1 ≤ t0.
    """
    choose(solver, SOLVERS, "solver")
    choose(gradient, GRADIENTS, "gradient mode")
    choose(error_norm, ERROR_NORMS, "error norm")
    if steps is not None:
        check_count(steps, "steps")
    check_count(max_steps, "max_steps")
    for name, value in (("rtol", rtol), ("atol", atol), ("first_step", first_step), ("min_step", min_step)):
        if value is None:
            continue
        positive(value, name)
        if not is_adaptive(solver, steps):
            which = f"{solver} makes fixed steps" if solver not in ADAPTIVE else f"{solver} shall make {steps} steps"
            raise InvalidInput(
                f"{name} is {value:g}, and {which}: leave {name} out, or choose one of {', '.join(ADAPTIVE)} without "
                "a number of steps"
            )
    if first_step is not None and min_step is not None and first_step < min_step:
        raise InvalidInput(
            f"first_step is {first_step:g}, below min_step = {min_step:g}: give a first step of at least {min_step:g}"
        )
    if solver in MULTISTEP and gradient in ("checkpoint", "reversible"):
        raise InvalidInput(
            f"gradient={gradient!r} needs a one-step solver, and {solver} is not one: use backprop or adjoint"
        )
    if not 0.0 < coupling <= 1.0:
        raise InvalidInput(f"coupling is {coupling!r}: a number in (0, 1] is expected, such as 0.99")
    if not -math.inf < t0 < t1 < math.inf:
        raise InvalidInput(f"an ODE block from t0 = {t0:g} to t1 = {t1:g}: t1 must be the larger, and both finite")


def check_extras(
    extra_channels: int, kinetic: float, jacobian: float, steer: float, t0: float = 0.0, t1: float = 1.0
) -> None:
    """Check what an ODE block does besides solving.

    Raises:
        InvalidInput: for a number below 0, infinite, or not whole where it counts, and a random end before t0.
    """
    if not isinstance(extra_channels, int) or extra_channels < 0:
        raise InvalidInput(f"extra_channels is {extra_channels!r}: a whole number of at least 0 is expected")
    for name, value in (("kinetic", kinetic), ("jacobian", jacobian), ("steer", steer)):
        if not 0.0 <= value < math.inf:
            raise InvalidInput(f"{name} is {value!r}: a finite number of at least 0 is expected")
    if steer >= t1 - t0:
        raise InvalidInput(
            f"steer is {steer:g}, and the interval [{t0:g}, {t1:g}] is no longer: the random end could lie before its "
            "start"
        )


def check_count(value: int, what: str) -> None:
    """Check that ``value`` is a whole number of at least 1.

    Raises:
        InvalidInput: when it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{what} is {value!r}: a whole number of at least 1 is expected")
