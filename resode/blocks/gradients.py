"""Gradient modes: how a solve is differentiated.

``backprop``
    Backpropagation through the solver's own steps: the exact gradient of the discrete solve, at a memory that grows
    with the number of steps. Double backward and forward-mode differentiation work.

``adjoint``
    The continuous adjoint (Chen et al. 2018, arXiv 1806.07366, Algorithm 1): with a = ∂L/∂h, solve backward in time

        dh/dt = f,    da/dt = −aᵀ ∂f/∂h,    dg/dt = −aᵀ ∂f/∂θ,    from h(t1), a(t1), g(t1) = 0,

    by the forward pass's solver on its own grid. Its memory does not depend on the number of steps. It is the gradient
    of the continuous problem, so it differs from ``backprop`` by the order of the solver, and h(t) is reconstructed.
    The cotangent is scaled to maximum 1 before the solve (the equations are linear in it), so that loss scaling
    changes neither the error control nor the result.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resode.blocks.adaptive import Adaptive
from resode.blocks.solvers import FixedGrid, Scheme, Solve, Tableau, axpy, stage_time

GRADIENTS = ("backprop", "adjoint")


def integrate(f: Solve, scheme: Scheme, h: Tensor, gradient: str, parameters: Sequence[Tensor]) -> Tensor:
    """The state at the end of ``scheme``, from ``h`` at its start, differentiable as ``gradient`` says.

    Args:
        parameters: the tensors, besides ``h``, to which ``f`` passes gradients.
    """
    differentiate = torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in parameters))
    if gradient == "backprop" or not differentiate:
        return scheme.integrate(f, h)
    return _Adjoint.apply(f, scheme, h, *parameters)


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager:
    # Without the cache of cast weights: a weight cast where gradients are off would be found again where they are on.
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Solve, scheme: Scheme, h: Tensor, *parameters: Tensor) -> Tensor:
        device = h.device.type
        ctx.f, ctx.scheme = f, scheme
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        with _autocast(*ctx.autocast):
            end = scheme.integrate(f, h)
        ctx.save_for_backward(end, *parameters)
        return end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        end, *parameters = ctx.saved_tensors
        context = ctx.f.context
        leaves = context.derived_leaves()
        largest = cotangent.abs().amax()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        field = AdjointField(ctx.f, (*parameters, *leaves))
        with _autocast(*ctx.autocast):
            a, gradients = solve_adjoint(ctx.scheme, field, end, cotangent / scale)
        derived = context.derived_gradients(parameters, gradients[len(parameters) :])
        total = [g if d is None else g + d for g, d in zip(gradients, derived, strict=False)]
        return None, None, a * scale, *(g * scale for g in total)


@dataclass
class AdjointField:
    """The right-hand side of the adjoint equations, for the tensors ``wanted``."""

    f: Solve
    wanted: tuple[Tensor, ...]

    def __call__(self, t: float | Tensor, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """f, −aᵀ ∂f/∂h and −aᵀ ∂f/∂θ at (t, h)."""
        self.f.stats.nfe_backward += 1
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            out = self.f.context.evaluate(self.f.branch, t, h)
            if not out.requires_grad:
                return out, torch.zeros_like(a), [torch.zeros_like(w) for w in self.wanted]
            found = torch.autograd.grad(out, (h, *self.wanted), -a.to(out.dtype), allow_unused=True)
        for_h, *rest = (
            torch.zeros_like(of) if g is None else g for g, of in zip(found, (h, *self.wanted), strict=True)
        )
        return out.detach(), for_h, rest


def solve_adjoint(scheme: Scheme, field: AdjointField, end: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor]]:
    """∂L/∂h at the scheme's start, and ∂L/∂θ, from the state ``end`` and ``a`` = ∂L/∂h at its end."""
    gradients = [torch.zeros_like(w) for w in field.wanted]
    if isinstance(scheme, FixedGrid):
        h = end
        for start, stop in pairwise(reversed(scheme.grid)):
            field.f.context.begin_step(start, stop)
            h, a = _adjoint_step(field, scheme.tableau, start, stop, h, a, gradients)
        return a, gradients
    if isinstance(scheme, Adaptive):
        state = (end, a, *gradients)
        for start, stop in pairwise(reversed(scheme.pieces())):
            field.f.context.begin_step(start, stop)
            state = scheme.solve_piece(lambda t, s: _flat(field(float(t), s[0], s[1])), state, start, stop)
        return state[1], list(state[2:])
    raise TypeError(f"no adjoint for a {type(scheme).__name__}")


def _flat(parts: tuple[Tensor, Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
    return parts[0], parts[1], *parts[2]


def _adjoint_step(
    field: AdjointField, tableau: Tableau, t: float, end: float, h: Tensor, a: Tensor, gradients: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """One step of (h, a); the right-hand side does not depend on ``gradients``, which are summed up in place."""
    step = end - t
    slopes: list[Tensor] = []
    slopes_a: list[Tensor] = []
    for row, b, c in zip(tableau.a, tableau.b, tableau.c, strict=True):
        stage = field(stage_time(t, end, c), axpy(h, step, row, slopes), axpy(a, step, row, slopes_a))
        slopes.append(stage[0])
        slopes_a.append(stage[1])
        for total, part in zip(gradients, stage[2], strict=True):
            total.add_(part, alpha=step * b)
    return axpy(h, step, tableau.b, slopes), axpy(a, step, tableau.b, slopes_a)
