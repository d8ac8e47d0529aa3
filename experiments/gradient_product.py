"""Do the gradient modes agree, whatever the solver, the norm and the dropout?

For every solver (fixed steps, and the embedded pairs with their error control too) × gradient mode × norm × dropout, on
a smooth branch in training mode, in float64, with the same masks:

- ``checkpoint`` against backpropagation, and ``reversible`` against that through its own scheme: the relative
  difference of the gradients (at most 1e-10);
- ``adjoint`` against backpropagation: the slope of log(difference) in log(step) on fixed grids (the order p of the
  solver, ± 0.2), and in log(tolerance) from 1e-3 to 1e-9 with an error control (at least 0.7).

    python -m experiments.gradient_product cpu --publish results     every combination, 6 minutes (make test-full)

Why the adjoint of heun (and of adaptive_heun, the same tableau) nears backpropagation with slope 3, one more than its
order: going backward by the tableau undoes the forward steps up to the leading error term if the order is even, and it
gives the derivative of the forward steps, transposed, up to the leading term if that term keeps the pairing of
cotangents and states, which for p = 2 is Σ b_i c_i² + Σ b_i a_ij c_j = 1/2 (the symplecticity condition of order 3:
Hairer, Lubich & Wanner, Geometric Numerical Integration, VI.7): 1/2 + 0 for heun, but 1/4 for midpoint and 1/3 for
ralston.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common import main
from resode.blocks import ADAPTIVE, TABLEAUX, Branch, ODEBlock
from resode.blocks.reversible import COUPLING, ReversibleStep
from resode.blocks.solvers import Solve
from resode.errors import ResodeError
from resode.layers.context import SolveContext
from resode.layers.dropout import DROPOUTS
from resode.layers.norm import NORMS
from resode.runs import Run
from resode.stack import Dropout, Stack

EXACT = 1e-10
"""The largest relative difference of gradients that shall be the same."""
NEAR = 0.2
"""The largest difference of a slope from the order."""
FALLING = 0.7
"""The smallest slope in the tolerance."""
STEPS = (3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)
TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)
ROUNDING = 1e-14
"""Ten times what rounding makes of these gradients: no slope can be read from differences below it."""
HORIZONS = {"adaptive_heun": 0.03, "bosh3": 0.5, "tsit5": 1.0, "dopri5": 1.0, "dopri8": 2.0}
"""Ends of the solves with an error control: a method of order 2 makes hundreds of steps to 0.03 at a tolerance of 1e-9,
and one of order 8 two steps to 1 at 1e-3."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "solver": (*((name, False) for name in TABLEAUX), *((name, True) for name in ADAPTIVE)),
    "norm": NORMS,
    "dropout": ("none", *DROPOUTS),
    "gradient": ("checkpoint", "reversible", "adjoint"),
}


@dataclass(frozen=True)
class Case:
    """One point of the product.

    Args:
        solver: the tableau, and whether an error control chooses the steps.
        norm: the norm of the branch.
        dropout: its kind of dropout, or "none".
        gradient: the mode that is compared with backpropagation.
    """

    solver: tuple[str, bool]
    norm: str
    dropout: str
    gradient: str

    @property
    def order(self) -> int:
        """Order with which the adjoint nears backpropagation on fixed grids (see the head of this module)."""
        name, _ = self.solver
        return TABLEAUX[name].order + ("heun" in name)

    def measure(self) -> float:
        """The difference of gradients, or its slope."""
        name, controlled = self.solver
        if self.gradient != "adjoint":
            grid = {"rtol": 1e-4, "atol": 1e-4} if controlled else {"steps": 4}
            return self.difference(name, mask_intervals=2, **grid)
        if controlled:
            errors = [self.difference(name, t1=HORIZONS[name], rtol=tol, atol=tol) for tol in TOLERANCES]
            return slope(TOLERANCES, errors)
        differences = ((1.0 / n, self.difference(name, steps=n)) for n in STEPS)
        # The finest three grids whose difference is not yet rounding.
        seen = list(takewhile(lambda pair: pair[1] > ROUNDING, differences))[-3:]
        return slope(*zip(*seen, strict=True))

    def holds(self, measured: float) -> bool:
        """Whether what was measured is what the mode promises."""
        if self.gradient != "adjoint":
            return measured <= EXACT
        if self.solver[1]:
            return measured >= FALLING
        return -NEAR <= measured - self.order <= self.above

    @property
    def above(self) -> float:
        """How far a slope may lie above the order.

        The coefficients of dopri8's error of order 8 are made small, and with a norm in the branch the term of order 9
        is no smaller as long as a difference is above rounding (with 4 to 12 steps): it falls faster there.
        """
        return 1.0 + NEAR if self.order == 8 and self.norm != "none" else NEAR

    def difference(self, name: str, **settings: Any) -> float:
        """The relative difference of this mode's gradients and backpropagation's."""
        branch = self.branch(strong="rtol" in settings)
        block = ODEBlock(branch, name, gradient=self.gradient, **settings)
        reference = ODEBlock(branch, name, **settings)
        through = reference if self.gradient != "reversible" else lambda x: reversible_by_autograd(reference, x)
        return difference(*(gradients(solve, branch) for solve in (block, through)))

    def branch(self, strong: bool = False) -> Branch:
        """A smooth branch of 8 channels; ``strong`` to give an error control something to do.

        FiLM's sin 4πt takes finer grids than order 8 leaves above rounding: the slopes are those of a time channel.
        """
        torch.manual_seed(0)
        dropout = Dropout() if self.dropout == "none" else Dropout(self.dropout, 0.25)
        adjoint = self.gradient == "adjoint"
        activation, time = ("softplus", "concat") if adjoint or len(self.norm + self.dropout) % 2 else ("tanh", "film")
        branch = Branch(8, Stack(norm=self.norm, activation=activation, dropout=dropout), time=time).double()
        with torch.no_grad():
            for parameter in branch.parameters():
                if parameter.ndim == 4:
                    parameter.mul_(3.0 if strong else 1.5 if self.norm == "none" else 1.0)
        return branch


def gradients(solve: Callable[[Tensor], Tensor], branch: Branch) -> list[Tensor]:
    """∂L/∂x and ∂L/∂θ of a smooth loss; the same masks and state for every solve."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.randn(3, 8, 4, 4, dtype=torch.float64, generator=generator)
    # Channels, pixels and samples that differ keep every norm's variance away from 0, where it is not smooth.
    x += torch.linspace(-2.0, 2.0, 8, dtype=x.dtype).view(1, 8, 1, 1)
    x += torch.linspace(-2.0, 2.0, 16, dtype=x.dtype).view(4, 4) * x.new_tensor([1.0, -1.0, 0.5]).view(3, 1, 1, 1)
    x.requires_grad_()
    torch.manual_seed(2)
    out = solve(x)
    weights = torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((torch.sin(out) * weights).mean(), (x, *branch.parameters())))


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of tensors, relative to no less than 1e-3 of the whole.

    (Some are 0 but for rounding: a shift before a norm that removes it.)
    """
    whole = float(torch.cat([part.flatten() for part in expected]).norm())
    return max(float((a - b).norm()) / max(float(b.norm()), 1e-3 * whole) for a, b in zip(found, expected, strict=True))


def reversible_by_autograd(block: ODEBlock, x: Tensor) -> Tensor:
    """The solve of ``gradient="reversible"``, differentiated by autograd through all its operations."""
    context = SolveContext(block.t0, block.t1, mask_intervals=block.mask_intervals)
    scheme = block.scheme()
    end = scheme.integrate(Solve(block.branch, context), (x, x), ReversibleStep(scheme.tableau, COUPLING))
    return end[0]


def slope(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """Slope of log(error) in log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def pairwise(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Points of the product of ``factors`` in which every two values of two factors meet.

    All pairs of the two longest factors, to which the others are added one by one, each time the value that makes the
    most new pairs (of several the one used least); then points for the pairs left over (In-parameter-order: Lei & Tai
    1998).
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    points = [dict(zip(names[:2], pair, strict=True)) for pair in product(*(factors[name] for name in names[:2]))]
    for k, name in enumerate(names[2:], start=2):
        left = {(other, a, b) for other in names[:k] for a in factors[other] for b in factors[name]}
        used: Counter[Any] = Counter()
        for point in points:
            made = {b: {(other, point[other], b) for other in names[:k]} & left for b in factors[name]}
            _, best = max((len(made[b]) - used[b] / len(points), -i) for i, b in enumerate(factors[name]))
            point[name] = factors[name][-best]
            used[point[name]] += 1
            left -= made[point[name]]
        rest = {other: factors[other][0] for other in names[:k]}
        points += [{**rest, other: a, name: b} for other, a, b in sorted(left, key=str)]
    yield from ({name: point[name] for name in factors} for point in points)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the check.

    Args:
        every: every combination, rather than enough that every two values meet.
        solvers: names of tableaux.
    """

    every: bool = True
    solvers: tuple[str, ...] = tuple(TABLEAUX)


CONFIGS = {"smoke": Config(every=False, solvers=("euler", "heun")), "cpu": Config()}


def cases(config: Config) -> list[Case]:
    """The whole product, or a pairwise covering of it."""
    solvers = [solver for solver in FACTORS["solver"] if solver[0] in config.solvers]
    factors = {**FACTORS, "solver": tuple(solvers)}
    if config.every:
        return [Case(*values) for values in product(*factors.values())]
    return [Case(**point) for point in pairwise(factors)]


def run(config: Config, out: Run) -> None:
    """Measure every case, and save the worst of each solver and mode.

    Raises:
        ResodeError: when a mode breaks its promise.
    """
    measured = {case: case.measure() for case in tqdm(cases(config), desc="gradients", mininterval=2.0)}
    failures = [{**asdict(case), "measured": value} for case, value in measured.items() if not case.holds(value)]
    out.save_result("modes", {"cases": len(measured), "failures": failures, "worst": summary(measured)})
    if failures:
        raise ResodeError(f"{len(failures)} of {len(measured)} cases fail, the first: {failures[0]} (see {out.path})")


def summary(measured: Mapping[Case, float]) -> list[dict[str, Any]]:
    """For each solver and mode: how many cases, and the range of what was measured in them."""
    rows = []
    for (name, controlled), gradient in product(FACTORS["solver"], FACTORS["gradient"]):
        found = [v for case, v in measured.items() if (case.solver, case.gradient) == ((name, controlled), gradient)]
        if not found:
            continue
        row = {"solver": name, "steps": "adaptive" if controlled else "fixed", "gradient": gradient, "n": len(found)}
        if gradient != "adjoint":
            rows.append(row | {"largest_difference": max(found), "allowed": EXACT})
        elif controlled:
            rows.append(row | {"smallest_slope": min(found), "largest_slope": max(found), "at_least": FALLING})
        else:
            expected = {"order": Case((name, False), "none", "none", gradient).order}
            rows.append(row | {"smallest_slope": min(found), "largest_slope": max(found)} | expected)
    return rows


if __name__ == "__main__":
    main("gradient_product", "Do the gradient modes agree, whatever the solver, norm and dropout?", CONFIGS, run)
