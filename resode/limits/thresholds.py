"""What a certificate's verdict rests on, fixed before any net was trained to be looked at by it.

A net is *near an ODE* at the steps it is used with if the solver's error there is small, and is the solver's: it falls
at the solver's order when the steps are refined. Every number here is relative, and without units.
"""

FAR = 0.1
"""A relative change of logits, or of states, above which a net is not near its flow. With an error e of the solve the
ratio of the errors at N and at 2N steps is 2^p (1 + O(e)): above a tenth, neither the order nor the limit can be read
off the next grid, and saying that the net approximates that limit says nothing. And a class whose logit leads by less
than e·‖z‖ may change: the lead of the first of ten logits over the second is typically a few tenths of ‖z‖."""

RESOLVED = 0.01
"""A relative error below which the flow is reproduced for every purpose, whatever the order is by which the error still
falls: on fields with kinks the small rest of it falls irregularly, and near rounding not at all."""

ORDER_SHARE = 0.5
SMOOTH_ORDER = 2
"""Between both the error must fall at least at ORDER_SHARE of the solver's order p, where p counts as no more than
SMOOTH_ORDER: a field of ReLUs is Lipschitz continuous with kinks in the gradient, and a step of size Δ across a kink
errs by O(Δ²), so that no solver is of a higher order than 2 on it (rk4 shows slopes of 1.4 to 2.5). Half of it leaves
room for grids that are not fine yet, and still asks for an error that falls: at a share of ½, to 0.71 or a half of it
with every doubling."""

ORDER_EXCESS = 1.0
"""And at most at the order p + 1: an error that falls faster is none of the solver's. It was the grid's own, which the
weights had fitted, and goes with it."""

LOSS_OF_ACCURACY = 0.01
"""By how much of accuracy refined steps, or the reference solve, may be worse: less than seeds differ on such data.
What the choice of samples leaves open counts as not told."""

ROUNDING_SHARE = 0.1
"""An error of which rounding may make up more than this cannot be told from rounding."""


def least_order(order: int) -> float:
    """At which order the error of a solver of this ``order`` must fall."""
    return ORDER_SHARE * min(order, SMOOTH_ORDER)


def most_order(order: int) -> float:
    """At which order it may fall."""
    return order + ORDER_EXCESS
