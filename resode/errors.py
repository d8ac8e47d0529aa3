"""What resode raises when it is asked for something it cannot do.

Every message names the value it was given, what was expected, and what to do. The command line prints these as
one line; any other exception is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterable


class ResodeError(Exception):
    """Base of the errors that resode raises on purpose."""


class InvalidInput(ResodeError, ValueError):
    """An argument, a setting or a file that cannot be used."""


class NoSuchSteps(InvalidInput):
    """A network that has no steps of the kind that is asked about."""


class RunError(ResodeError):
    """A run folder that cannot be made, read or continued."""


class SolverError(ResodeError, ArithmeticError):
    """An adaptive solve that cannot go on."""


class TrainingError(ResodeError, ArithmeticError):
    """A training that cannot go on (a loss that is not finite, for one)."""


def choose(value: str, choices: Iterable[str], what: str) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        InvalidInput: with the choices, when it is not.
    """
    choices = tuple(choices)
    if value not in choices:
        raise InvalidInput(f"unknown {what} {value!r}: choose from {', '.join(choices)}")
    return value


def probability(value: float, what: str) -> float:
    """Return ``value`` if it lies in [0, 1).

    Raises:
        InvalidInput: when it does not.
    """
    if not 0.0 <= value < 1.0:
        raise InvalidInput(f"{what} is {value!r}: it must be a probability in [0, 1)")
    return value


def positive(value: float, what: str) -> float:
    """Return ``value`` if it is a finite number above 0.

    Raises:
        InvalidInput: when it is not.
    """
    if not 0 < value < float("inf"):
        raise InvalidInput(f"{what} is {value!r}: it must be a finite number above 0")
    return value
