"""The verdict of a certificate: is the net near an ODE at the steps it is used with?

Five checks, each against a threshold that was fixed beforehand (``limits.thresholds``), say yes, no, or that it cannot
be told. One no is a no. The net is near an ODE if the solver swaps and the trajectory say yes; that the reconstruction
cannot be told where the way back is ill-conditioned does not change it, and is said.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from resode.limits.distance import Distance
from resode.limits.reconstruction import BlockReconstruction, Reconstruction
from resode.limits.record import Record
from resode.limits.swap import REFINED, Swap
from resode.limits.thresholds import FAR, LOSS_OF_ACCURACY, RESOLVED, ROUNDING_SHARE, least_order, most_order

SPOKEN = {True: "near an ODE", False: "not near an ODE", None: "cannot be told"}


@dataclass(frozen=True)
class Check(Record):
    """One of the checks.

    Args:
        name: refinement, accuracy, order, trajectory or reconstruction.
        passed: None where it cannot be told.
        value: the number it rests on; None where there is none.
        threshold: what the number was held against; None where there is none.
        words: a sentence.
    """

    name: str
    passed: bool | None
    value: float | None
    threshold: float | None
    words: str


@dataclass(frozen=True)
class Verdict(Record):
    """Whether a net is near an ODE at its steps.

    Args:
        near_ode: None where it cannot be told.
        words: the verdict, with its reasons.
        checks: what it rests on.
        far, resolved: the thresholds of relative changes (``limits.thresholds``).
    """

    near_ode: bool | None
    words: str
    checks: tuple[Check, ...]
    far: float = FAR
    resolved: float = RESOLVED

    @property
    def spoken(self) -> str:
        """The verdict in two or three words."""
        return SPOKEN[self.near_ode]


def verdict(swap: Swap, distance: Distance, reconstruction: Reconstruction | None, why_not: str = "") -> Verdict:
    """The verdict from the parts of a certificate that it rests on.

    Args:
        reconstruction: None where a block has no inverse; ``why_not`` says why.
    """
    checks = (
        _refinement(swap),
        _accuracy(swap),
        _order(swap),
        _trajectory(distance, swap),
        _reconstruction(reconstruction, why_not),
    )
    no = [check for check in checks if check.passed is False]
    untold = [check for check in checks if check.passed is None]
    near: bool | None
    if no:
        near, reasons = False, no
    elif any(check.name != "reconstruction" for check in untold):
        near, reasons = None, untold
    else:
        near, reasons = True, list(checks)
    said = f"{_sentence(SPOKEN[near])} at {_used(swap)}: {'; '.join(check.words for check in reasons)}."
    return Verdict(near, said, checks)


def no_flow(why: str) -> Verdict:
    """The verdict on a net that neither has ODE blocks nor can be lifted."""
    return Verdict(None, f"{_sentence(SPOKEN[None])}: {why}.", ())


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _used(swap: Swap) -> str:
    counts: dict[str, list[int | None]] = {}
    for solver, steps in dict.fromkeys(swap.used):
        counts.setdefault(solver, []).append(steps)
    return " and ".join(_steps(solver, steps) for solver, steps in counts.items())


def _steps(solver: str, steps: list[int | None]) -> str:
    if None in steps:
        return f"steps that {solver} chooses"
    return f"{' and '.join(map(str, steps))} step{'s' * (steps != [1])} of {solver}"


def _refinement(swap: Swap) -> Check:
    """Refining the steps, or the reference solve, changes the logits by little."""
    name = "refinement"
    if swap.rounding > ROUNDING_SHARE * FAR:
        words = (
            f"the logits are so sensitive that rounding alone may change them by {swap.rounding:.1g} "
            "(float64 would tell more)"
        )
        return Check(name, None, swap.rounding, ROUNDING_SHARE * FAR, words)
    changes = {f"{factor:g} times the steps": swap.own(factor).change for factor in REFINED}
    changes["the reference solve"] = swap.reference.change
    worst = max(changes, key=lambda what: _size(changes[what]))
    value = _size(changes[worst])
    if value > FAR:
        return Check(name, False, value, FAR, f"{worst} changes the logits by {value:.2g}, more than {FAR:g}")
    return Check(name, True, value, FAR, f"refining the steps changes the logits by no more than {value:.2g}")


def _accuracy(swap: Swap) -> Check:
    """Refining the steps, or the reference solve, loses no accuracy."""
    solves = [swap.own(factor) for factor in REFINED] + [swap.reference]
    worst = max(solves, key=lambda solved: solved.lost)
    least, lost = worst.lost - worst.lost_margin, worst.lost
    if lost <= LOSS_OF_ACCURACY:
        words = f"it loses {f'no more than {lost:.1%} of' if lost > 0.0 else 'no'} accuracy by it"
        return Check("accuracy", True, lost, LOSS_OF_ACCURACY, words)
    words = f"accuracy falls by {lost:.1%} (± {worst.lost_margin:.1%}) when the steps are refined"
    if least > LOSS_OF_ACCURACY:
        return Check("accuracy", False, lost, LOSS_OF_ACCURACY, words)
    return Check("accuracy", None, lost, LOSS_OF_ACCURACY, f"{words}: {swap.count} samples are too few to tell")


def _order(swap: Swap) -> Check:
    """The error falls at the solver's order, or there is next to none."""
    error, order, observed = swap.own().error, swap.order, swap.observed_order
    if error <= RESOLVED:
        return Check("order", True, error, RESOLVED, f"the solver's error of the logits is {error:.1g}")
    least, most = least_order(order), most_order(order)
    if observed is None:
        return Check("order", False, None, least, "the error of the logits does not fall when the steps are doubled")
    said = f"the error of the logits falls with order {observed:.2g} when the steps are doubled"
    if least <= observed <= most:
        return Check("order", True, observed, least, f"{said} (the solver's is {order})")
    if observed < least:
        return Check("order", False, observed, least, f"{said}, and no less than {least:g} was to be expected")
    words = f"{said}, faster than the solver's {order} allows: the error is that of one grid alone"
    return Check("order", False, observed, most, words)


def _trajectory(distance: Distance, swap: Swap) -> Check:
    """The states along the way are near those of the flow."""
    worst = distance.worst
    if worst > FAR:
        words = f"the states along the way are off those of the ODE by {worst:.2g}, more than {FAR:g}"
        return Check("trajectory", False, worst, FAR, words)
    return Check("trajectory", True, worst, FAR, f"the states along the way are off those of the ODE by {worst:.2g}")


def _reconstruction(found: Reconstruction | None, why_not: str) -> Check:
    """Forward and back again, the error is small, or falls at the solver's order."""
    if found is None:
        return Check("reconstruction", None, None, None, f"no way back to look at ({why_not})")
    checks = list(_blocks(found))
    for passed in (False, None, True):
        ones = [check for check in checks if check.passed is passed]
        if ones:
            return max(ones, key=lambda check: _size(check.value if check.value is not None else math.nan))
    raise AssertionError("a flow has blocks")


def _blocks(found: Reconstruction) -> Iterator[Check]:
    name = "reconstruction"
    for block in found.blocks:
        error, finest = _size(block.errors[0]), _size(block.errors[-1])
        where = f"the input of block {block.name} comes back" if len(found.blocks) > 1 else "the input comes back"
        said = f"{where} to {error:.1g}"
        if error <= RESOLVED:
            yield Check(name, True, error, RESOLVED, said)
        elif not math.isfinite(finest) or block.rounding > ROUNDING_SHARE * finest:
            words = f"{said}, and the way back is ill-conditioned: it amplifies {block.amplification:.1g}-fold"
            yield Check(name, None, error, RESOLVED, words)
        else:
            yield _falls(block, error, said)


def _falls(block: BlockReconstruction, error: float, said: str) -> Check:
    """Whether the error of a block's reconstruction falls at the solver's order with one of the doublings."""
    least = least_order(block.order)
    orders = [order for order in block.observed_orders if order is not None]
    if orders and max(orders) >= least:
        words = f"{said}, an error of discretization, which falls with order {max(orders):.2g}"
        return Check("reconstruction", True, error, least, words)
    words = f"{said}, and refining the steps does not bring it nearer at the solver's order"
    return Check("reconstruction", False, error, least, words)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value
