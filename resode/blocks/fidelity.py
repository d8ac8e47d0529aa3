"""The fidelity meter: how far a gradient mode is from backpropagation, on the block and the batch at hand.

For the gradient g of vᵀ h(t1) with respect to each parameter, and to x, as the block's mode gives it and as
backpropagation does, with the same settings, masks and batch moments, it compares

    cosine ⟨g, g_backprop⟩/(‖g‖ ‖g_backprop‖),        relative error ‖g − g_backprop‖/‖g_backprop‖.

A continuous adjoint is off by the order of its solver (Chen et al. 2018, arXiv 1806.07366), and without a sign of it
where the flow cannot be retraced (Gholami et al. 2019, ANODE, arXiv 1902.10298): h comes back to another start than x.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from resode.blocks.gradients import Mode
from resode.blocks.ode import ODEBlock
from resode.blocks.reversible import Reversible, ReversibleStep, halves
from resode.blocks.solvers import Scheme, Solve, State
from resode.errors import InvalidInput

FIDELITY_TOLERANCE = 1e-2
"""The relative error of a parameter's gradient above which a training is warned.

An adjoint whose tolerances are an ordinary 1e-3 is off by about this much. Below it the bias is small beside the noise
of mini-batches, which is of the order of the gradient itself; above it the solve is likely to be too coarse for the
flow that was learned, and the bias, unlike the noise, points the same way at every step.
"""


@dataclass(frozen=True)
class Agreement:
    """The cosine of the angle between two gradients, and the distance of the one from the other, relative to it.

    A gradient counts as zero if its norm is a share of that of all the parameters' which rounding may account for
    (√ε of its type), such as of a bias before a batch norm: below that, the distance is relative to this share, and
    the cosine of two zeros is 1. The distance from an exact zero to anything else is infinite.
    """

    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Fidelity:
    """What :func:`gradient_fidelity` finds.

    Args:
        mode: the gradient mode.
        parameters: of each parameter that needs a gradient, by its name in the block.
        input: of x.
        reconstruction_error: ‖h_back(t0) − x‖/‖x‖, with h_back the state that the backward solve came back to; None
            for the modes that need not come back (backprop, checkpoint).
    """

    mode: str
    parameters: Mapping[str, Agreement]
    input: Agreement
    reconstruction_error: float | None

    @property
    def worst(self) -> tuple[str, float]:
        """The name ("input" for x) and the error of what has the largest relative error; NaN counts as the largest."""
        errors = {name: found.relative_error for name, found in self.parameters.items()}
        errors = {**errors, "input": self.input.relative_error}
        name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        return name, errors[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fidelity":
        """The inverse of :meth:`to_dict`."""
        parameters = {name: Agreement(**found) for name, found in values["parameters"].items()}
        return cls(**{**values, "parameters": parameters, "input": Agreement(**values["input"])})


def gradient_fidelity(
    block: ODEBlock, x: Tensor, cotangent: Tensor | None = None, *, own_scheme: bool = False
) -> Fidelity:
    """The gradient of vᵀ block(x) by the mode of ``block`` against that by backpropagation, with all else the same.

    It costs a forward and a backward pass of each, the memory of backpropagation included. Copies of the block do the
    work, uncompiled and without penalties: the block, its buffers, its stats, its ``.grad`` and the global random
    state are left as they were.

    Args:
        x: (B, C) or (B, C, H, W).
        cotangent: v, of the shape of x; drawn from N(0, 1), always the same, if None.
        own_scheme: compare ``reversible`` with backpropagation through its own steps, from which only rounding takes
            it, in the place of backpropagation through the tableau's. The latter solves by another scheme of the same
            order, so that errors of the tableau's order are to be expected, and are none of the gradient's: it is the
            exact one of the solve that was made.

    Raises:
        InvalidInput: for what is no ODE block, a cotangent of another shape, and as the block itself raises.
        SolverError: when an adaptive solve, or the adjoint's way back, cannot go on.
    """
    if not isinstance(block, ODEBlock):
        raise InvalidInput(f"gradient fidelity is of an ODE block, and this is a {type(block).__name__}")
    if cotangent is None:
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    elif cotangent.shape != x.shape:
        raise InvalidInput(
            f"the cotangent has the shape {tuple(cotangent.shape)}, and the block's output {tuple(x.shape)}"
        )
    own, oracle = _twin(block), _twin(block)
    mode = own._mode()
    own._mode = lambda: mode
    _backpropagate(oracle, reversibly=own_scheme and isinstance(mode, Reversible))
    found, exact = _gradients(own, x, cotangent), _gradients(oracle, x, cotangent)
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    floor = _negligible(exact[1:])
    return Fidelity(
        block.gradient,
        {name: _agreement(g, e, floor) for name, g, e in zip(names, found[1:], exact[1:], strict=True)},
        _agreement(found[0], exact[0], 0.0),
        _reconstruction_error(mode, block.augment(x.detach())),
    )


def _twin(block: ODEBlock) -> ODEBlock:
    twin = copy.deepcopy(block)
    twin.compile_mode, twin.kinetic, twin.jacobian = None, 0.0, 0.0
    return twin


def _backpropagate(block: ODEBlock, reversibly: bool) -> None:
    """Let ``block`` be differentiated by autograd, through the steps of the tableau or their reversible form."""
    coupling, block.gradient = block.coupling, "backprop"

    def through_its_own_steps(f: Solve, scheme: Scheme, state: State) -> State:
        return halves(scheme.integrate(f, (*state, *state), ReversibleStep(scheme.tableau, coupling)))[0]

    if reversibly:
        block._integrate = through_its_own_steps


def _gradients(block: ODEBlock, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The gradients with respect to ``x`` and each parameter that needs one; every call draws the same numbers."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
        inputs = [x.detach().requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
        found = torch.autograd.grad(block(inputs[0]), inputs, cotangent, allow_unused=True)
    return [torch.zeros_like(of) if g is None else g for g, of in zip(found, inputs, strict=True)]


def _negligible(gradients: Sequence[Tensor]) -> float:
    """The norm up to which rounding may account for one of the ``gradients``."""
    if not gradients:
        return 0.0
    coarsest = max(torch.finfo(g.dtype).eps for g in gradients)
    return math.sqrt(coarsest) * math.hypot(*(_norm(g) for g in gradients))


def _agreement(found: Tensor, exact: Tensor, floor: float) -> Agreement:
    found, exact = found.double(), exact.double()
    off, size, other = _norm(found - exact), _norm(exact), _norm(found)
    if max(size, other) <= floor:
        cosine = 1.0
    elif min(size, other) == 0.0:
        cosine = 0.0
    else:
        cosine = float(torch.dot(found.flatten() / other, exact.flatten() / size))
    scale = max(size, floor)
    return Agreement(cosine, off / scale if scale else (math.inf if off else 0.0))


def _reconstruction_error(mode: Mode | None, x: Tensor) -> float | None:
    start = getattr(mode, "start", None)
    return None if start is None else _agreement(start, x, 0.0).relative_error


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))
