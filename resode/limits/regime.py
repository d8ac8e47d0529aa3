"""Which limit do trained nets approach as their depth grows? Exponents over nets of several depths.

============ ====================== ================================== =================================================
regime       relative increment     roughness ‖W_{l+1} − W_l‖/‖W_l‖    limit
============ ====================== ================================== =================================================
smooth       L^(−1)                 L^(−1)                             an ordinary differential equation
diffusive    L^(−1/2)               L^0                                a stochastic differential equation
neither      any other
============ ====================== ================================== =================================================

(Cohen et al. 2021, arXiv 2105.12245, hypotheses 1 and 2; Marion et al. 2022, arXiv 2206.06929.) Between them lie
weights that are continuous in depth and not smooth: of a process with Hurst exponent H, such as Brownian motion with
H = ½, the roughness is L^(−H). So neighbouring exponents are ½ apart, and the lines are drawn half way, at ¼ from each.
A regime is told where both 95% intervals lie within these lines, and "undecided" is said where an interval crosses one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from resode.errors import InvalidInput
from resode.limits.exponents import Exponent, fit_exponent
from resode.limits.record import Record
from resode.limits.regularity import Regularity, StretchRegularity

LINE = 0.25
REGIMES = {"smooth": (-1.0, -1.0), "diffusive": (-0.5, 0.0)}
"""Exponents of the relative increment and of the roughness."""
QUANTITIES = (
    "relative_increment",
    "roughness",
    "weight",
    "difference",
    "coherence",
    "length",
    "quadratic",
    "displacement",
    "straightness",
)


@dataclass(frozen=True)
class Fit(Record):
    """The p of ``quantity`` ∝ L^p.

    Args:
        quantity: its name.
        mean, low, high: mean over ``count`` seeds, and its 95% interval.
        local: the mean slopes from each depth to the next.
        values: for each seed, by depth.
    """

    quantity: str
    mean: float
    low: float
    high: float
    count: int
    local: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def near(self, value: float) -> bool | None:
        """Whether the exponent is ``value``, to the lines; None where the interval crosses one."""
        low, high = value - LINE, value + LINE
        if low <= self.low and self.high <= high:
            return True
        return False if self.high < low or self.low > high else None


@dataclass(frozen=True)
class StretchRegime(Record):
    """One stage.

    Args:
        stage: index of the stage.
        depths: L of each net, increasing.
        fits: by quantity; those that are 0, or not there, at some depth have none.
        regime: smooth, diffusive, neither or undecided.
        words: why.
    """

    stage: int
    depths: tuple[int, ...]
    fits: tuple[Fit, ...]
    regime: Literal["smooth", "diffusive", "neither", "undecided"]
    words: str

    def fit(self, quantity: str) -> Fit | None:
        """The fit of ``quantity``."""
        return next((fit for fit in self.fits if fit.quantity == quantity), None)


@dataclass(frozen=True)
class Regime(Record):
    """Nets of several depths and seeds, by stage."""

    stretches: tuple[StretchRegime, ...]


def regime(found: Mapping[int, Mapping[int, Regularity]]) -> Regime:
    """The exponents in depth of what ``limits.regularity`` found of nets that differ in depth and seed alone.

    The depth is that of each stretch itself, the number of residual steps that keep its space.

    Args:
        found: by seed, and for each by depth (or whatever orders the nets).

    Raises:
        InvalidInput: for fewer than 5 depths, a span below 16, fewer than 2 seeds, seeds of different depths, or nets
            of different stages.
    """
    nets = [net for row in found.values() for net in row.values()]
    counts = {len(net.stretches) for net in nets}
    if len(counts) != 1:
        raise InvalidInput(
            f"nets with {sorted(counts)} stages of residual steps: nets that differ in depth alone, please"
        )
    return Regime(
        tuple(
            _of_stretch({seed: [net.stretches[i] for net in row.values()] for seed, row in found.items()})
            for i in range(counts.pop())
        )
    )


def _of_stretch(found: Mapping[int, list[StretchRegularity]]) -> StretchRegime:
    fits = []
    for quantity in QUANTITIES:
        values = {seed: {one.depth: _value(one, quantity) for one in row} for seed, row in found.items()}
        if any(value is None for row in values.values() for value in row.values()):
            continue
        fitted = fit_exponent(values)
        if fitted is not None:
            fits.append(_as_fit(quantity, fitted, values))
    first = next(iter(found.values()))
    increment = next((fit for fit in fits if fit.quantity == "relative_increment"), None)
    roughness = next((fit for fit in fits if fit.quantity == "roughness"), None)
    same = all(_value(one, "roughness") == 0.0 for row in found.values() for one in row)
    told, words = _regime(increment, roughness, same)
    return StretchRegime(first[0].stage, tuple(sorted(one.depth for one in first)), tuple(fits), told, words)


def _as_fit(quantity: str, found: Exponent, values: Mapping[int, Mapping[int, float]]) -> Fit:
    rows = tuple(tuple(row[depth] for depth in sorted(row)) for row in values.values())
    return Fit(quantity, found.mean, found.low, found.high, found.count, found.local, rows)


def _value(one: StretchRegularity, quantity: str) -> float | None:
    if quantity == "weight":
        return None if one.weights is None else sum(one.weights) / one.depth
    if quantity == "difference":
        return sum(one.differences) / len(one.differences) if one.differences else None
    return getattr(one, quantity)


def _regime(increment: Fit | None, roughness: Fit | None, same: bool) -> tuple[str, str]:
    """The regime, and why. ``same``: the weights are the same at every step."""
    if increment is None or (roughness is None and not same):
        return "undecided", "increments or weights follow no power of the depth, or there are none"
    said = f"increments go like L^{_said(increment)}, "
    said += "and the weights are all the same" if same else f"the roughness of the weights like L^{_said(roughness)}"
    near = {}
    for name, (step, rough) in REGIMES.items():
        weights = name == "smooth" if same else roughness.near(rough)
        answers = (increment.near(step), weights)
        near[name] = False if False in answers else None if None in answers else True
    for name, answer in near.items():
        if answer:
            return name, said
    return ("undecided" if None in near.values() else "neither"), said


def _said(fit: Fit) -> str:
    return f"{fit.mean:.2f} ({fit.low:.2f} to {fit.high:.2f})"
