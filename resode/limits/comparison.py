"""What solves of one net are compared by: relative differences, and which answers are right."""

import math

from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖ over all that they hold, as :func:`ratio` has it."""
    return ratio(float((found.double() - expected.double()).norm()), float(expected.double().norm()))


def ratio(off: float, size: float) -> float:
    """off/size of sizes of at least 0: 0 where ``off`` is, and infinite where ``off`` is no number or ``size`` is 0."""
    if off == 0.0:
        return 0.0
    return off / size if math.isfinite(off) and size > 0.0 else math.inf


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of each sample's ``logits`` (B, classes) is that of its label, (B,).

    No answer that holds infinities or no numbers is right: their largest would be some class or other.
    """
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)
