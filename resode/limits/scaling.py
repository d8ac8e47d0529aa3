"""What a residual stage does at initialization as its depth grows, by the factor of its branches and their weights.

A stage of L blocks h_{l+1} = h_l + L^(−β) f(W_l, h_l), its weights drawn at random (see ``limits.draws``), takes the
input h_0 to h_L, and the cotangent g_L of h_L to the cotangent g_0 of h_0. As L → ∞, ‖h_L − h_0‖/‖h_0‖ goes like L^p:

========================================= =============================== =========================================
weights                                   p, with a norm in the branch    without a norm
========================================= =============================== =========================================
iid: the f_l add up as a random walk      ½ − β                           the same for β ≥ ½; below, ‖h_L‖ grows
                                                                          like exp(c L^(1−2β))
smooth or tied: they add up as a sum of   1 − β                           the same for β ≥ 1; below, ‖h_L‖ grows
like terms                                                                like exp(c L^(1−β))
========================================= =============================== =========================================

So p > 0 is an explosion, p < 0 leaves the identity, and only p = 0 is a non-trivial limit: for independent weights at
1/√L, a stochastic differential equation; for smooth ones at 1/L, an ordinary one (Marion et al. 2022, arXiv 2206.06929;
Cohen et al. 2021, arXiv 2105.12245; Hayou et al. 2021, arXiv 2010.12859). With the learned factor of SkipInit, which
starts at 0, the stage is the identity at any depth (De & Smith 2020, arXiv 2002.10444).

Without a norm ‖g_0‖/‖g_L‖ goes as ‖h_L‖/‖h_0‖ does. With batch norm in the mlp, independent weights and β = 0 it grows
faster: the variance over the batch that the norm divides by is 1 + (1 − 1/π) l before block l, since 1/π of E relu(z)²
is the square of the mean, which the norm removes. So ‖g_0‖² is about Π_l (1 + 1/(1 + (1 − 1/π) l)) ‖g_L‖², and the
gradient goes like L^(π/(2(π − 1))) = L^0.73 where the state goes like L^0.5: polynomial, where without the norm both
go like 2^(L/2).

The exponents are all multiples of ½ (for the β of 0, ½ and 1 that are in use), so that the verdict draws its lines half
way between them, at ±¼: it is given where the whole 95% interval of p lies on one side of them, and "undecided" is the
verdict otherwise. A quantity that grows faster than any power shows in local exponents that grow (:class:`Exponent`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resode.limits.draws import normal
from resode.limits.exponents import Exponent, check_depths, fit_exponent
from resode.limits.stages import DrawnStage, Stage

DEPTHS = (8, 16, 32, 64, 128, 256, 512, 1000)
LINE = 0.25
"""The verdict's lines lie at exponents of ±¼, half way between the multiples of ½ that theory gives."""
EXPLOSION, IDENTITY, LIMIT, UNDECIDED = "explosion", "identity", "non-trivial limit", "undecided"
QUANTITIES = ("change", "state", "gradient", "gradient_change")


@dataclass(frozen=True)
class Growth:
    """What a stage of ``depth`` blocks drawn from ``seed`` does to states and gradients, by their Frobenius norms.

    Args:
        change: ‖h_L − h_0‖/‖h_0‖.
        state: ‖h_L‖/‖h_0‖.
        gradient: ‖g_0‖/‖g_L‖, for a Gaussian g_L.
        gradient_change: ‖g_0 − g_L‖/‖g_L‖.

    Infinite where they are beyond the largest number.
    """

    depth: int
    seed: int
    change: float
    state: float
    gradient: float
    gradient_change: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Growth":
        """The inverse of ``dataclasses.asdict``; what JSON has no number for is infinite."""
        return cls(**{name: math.inf if value is None else value for name, value in values.items()})


@dataclass(frozen=True)
class ScalingTable:
    """How a stage behaves as its depth grows.

    Args:
        stage: its settings.
        growths: one for each depth and seed.
        exponents: of each quantity of :class:`Growth`; None for one that is 0 or infinite somewhere.
        verdict: "explosion", "identity", "non-trivial limit" or "undecided", of the states, by ``change``.
        gradient_verdict: the same of the gradients, by ``gradient_change``.
    """

    stage: Stage
    growths: tuple[Growth, ...]
    exponents: Mapping[str, Exponent | None]
    verdict: str
    gradient_verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScalingTable":
        """The inverse of :meth:`to_dict`."""
        exponents = {
            name: None if found is None else Exponent(**{**found, "local": tuple(found["local"])})
            for name, found in values["exponents"].items()
        }
        growths = tuple(Growth.from_dict(each) for each in values["growths"])
        return cls(Stage(**values["stage"]), growths, exponents, values["verdict"], values["gradient_verdict"])


def scaling(
    stage: Stage,
    depths: Sequence[int] = DEPTHS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ScalingTable:
    """Measure ``stage`` at each depth, from each seed, and fit exponents.

    Args:
        depths: at least 5, the largest at least 16 times the smallest.
        seeds: at least 2.

    Raises:
        InvalidInput: for fewer.
    """
    check_depths(depths, seeds)
    plan = [(depth, seed) for seed in seeds for depth in depths]
    bar = tqdm(plan, desc="scaling", leave=False, disable=None if progress else True)
    return tabulate(stage, [measure(stage, depth, seed, device=device) for depth, seed in bar])


def measure(stage: Stage, depth: int, seed: int, *, device: str | torch.device = "cpu") -> Growth:
    """One forward and one backward pass through ``depth`` blocks, from a Gaussian state and cotangent.

    Weights, state and cotangent are drawn from ``seed``, independently of each other, the same on every device.

    Raises:
        InvalidInput: for a depth below 1.
    """
    drawn = DrawnStage(stage, depth, seed, device)
    h, g = normal((2, *stage.shape), seed, 0).to(device)
    states = list(drawn.states(h))
    *_, pulled = drawn.pull_back(states, g)
    return Growth(
        depth,
        seed,
        _ratio(states[-1] - h, h),
        _ratio(states[-1], h),
        _ratio(pulled, g),
        _ratio(pulled - g, g),
    )


def tabulate(stage: Stage, growths: Sequence[Growth]) -> ScalingTable:
    """The table of what was measured of ``stage``.

    Raises:
        InvalidInput: for too few depths or seeds, or depths that differ between seeds.
    """
    exponents = {name: fit_exponent(_by_seed(growths, name)) for name in QUANTITIES}
    states, gradients = (
        verdict(exponents[name], [getattr(growth, name) for growth in growths])
        for name in ("change", "gradient_change")
    )
    return ScalingTable(stage, tuple(growths), exponents, states, gradients)


def _by_seed(growths: Sequence[Growth], name: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for growth in growths:
        found.setdefault(growth.seed, {})[growth.depth] = getattr(growth, name)
    return found


def verdict(exponent: Exponent | None, changes: Sequence[float]) -> str:
    """What becomes of a stage whose relative ``changes`` go with ``exponent``.

    Without an exponent: the identity if it changes nothing, an explosion if some change is infinite.
    """
    if not all(map(math.isfinite, changes)):
        return EXPLOSION
    if exponent is None:
        return IDENTITY if not any(changes) else UNDECIDED
    if exponent.low > LINE:
        return EXPLOSION
    if exponent.high < -LINE:
        return IDENTITY
    return LIMIT if exponent.within(-LINE, LINE) else UNDECIDED


def _ratio(a: Tensor, b: Tensor) -> float:
    """‖a‖/‖b‖; infinite where that is not a number."""
    ratio = float(a.norm() / b.norm())
    return ratio if math.isfinite(ratio) else math.inf
