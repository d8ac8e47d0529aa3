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
    changes neither the error control nor the result. The state of the adjoint solve is at least float32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.adaptive import Adaptive, TimeField, wide
from resode.blocks.solvers import FixedGrid, Scheme, Solve, Tableau, axpy, stage_time
from resode.errors import InvalidInput
from resode.layers.context import Field

GRADIENTS = ("backprop", "adjoint")


def integrate(f: Solve, scheme: Scheme, h: Tensor, gradient: str, parameters: Sequence[Tensor]) -> Tensor:
    """The state at the end of ``scheme``, from ``h`` at its start, differentiable as ``gradient`` says.

    Args:
        parameters: the tensors, besides ``h``, to which ``f`` passes gradients.

    Raises:
        InvalidInput: for an adjoint under a transform of torch.func; in its backward pass, when the branch depends on
            other tensors than ``h`` and ``parameters``; and when its gradient is differentiated.
    """
    differentiate = torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in parameters))
    if gradient == "backprop" or not differentiate:
        return scheme.integrate(f, h)
    if torch._C._are_functorch_transforms_active():
        raise InvalidInput(f"gradient={gradient!r} does not go with torch.func's transforms: use gradient='backprop'")
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
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _Adjoint.gradients(ctx, cotangent)
        if torch.is_grad_enabled():  # as they are when these gradients shall be differentiated (create_graph=True)
            gradients = _Once.apply(*(g.requires_grad_() for g in gradients))
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise InvalidInput("gradient='adjoint' has no forward mode: use gradient='backprop'")

    @staticmethod
    def gradients(ctx: Any, cotangent: Tensor) -> list[Tensor]:
        """∂L/∂h at the start, and ∂L/∂θ for the parameters."""
        end, *parameters = ctx.saved_tensors
        _check_same(parameters, ctx.f.branch)
        context = ctx.f.context
        leaves = context.derived_leaves()
        largest = cotangent.abs().amax()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        field = AdjointField(ctx.f, (*parameters, *leaves), end.dtype)
        with _autocast(*ctx.autocast):
            a, gradients = solve_adjoint(ctx.scheme, field, end, cotangent / scale)
        derived = context.derived_gradients(
            parameters, [g.to(leaf.dtype) for g, leaf in zip(gradients[len(parameters) :], leaves, strict=True)]
        )
        total = [g if d is None else g + d for g, d in zip(gradients, derived, strict=False)]
        return [g * scale for g in (a, *total)]


class _Once(torch.autograd.Function):
    """The identity, with an error for a derivative.

    torch's ``once_differentiable`` is silent where the cotangent needs no gradient: a penalty on ∂L/∂h would then have
    no effect.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise InvalidInput("gradient='adjoint' cannot be differentiated twice: use gradient='backprop'")


def _check_same(parameters: Sequence[Tensor], branch: Field) -> None:
    # The backward pass evaluates the branch again, with whatever parameters it holds by then.
    held = {id(p) for p in branch.parameters()} if isinstance(branch, nn.Module) else None
    if held is not None and any(id(p) not in held for p in parameters):
        raise InvalidInput(
            "the branch no longer holds the parameters it had in the forward pass (torch.func.functional_call puts "
            "others in for the time of a call): use gradient='backprop'"
        )


def _check_leaves(out: Tensor, known: Sequence[Tensor]) -> None:
    # What else ``out`` was computed from would get no gradient, without a word.
    known_ids, seen, to_see = {id(tensor) for tensor in known}, set(), [out.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise InvalidInput(
                f"the branch depends on a tensor of shape {tuple(leaf.shape)} that needs a gradient and is none of its "
                "parameters: the adjoint would give it none; register it in the branch, or use gradient='backprop'"
            )
        to_see += (following for following, _ in node.next_functions)


@dataclass
class AdjointField:
    """The right-hand side of the adjoint equations, for the tensors ``wanted``; the branch computes in ``dtype``."""

    f: Solve
    wanted: tuple[Tensor, ...]
    dtype: torch.dtype
    checked: bool = False

    def __call__(self, t: float | Tensor, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """f, −aᵀ ∂f/∂h and −aᵀ ∂f/∂θ at (t, h)."""
        self.f.stats.nfe_backward += 1
        with torch.enable_grad():
            h = h.detach().to(self.dtype).requires_grad_()
            out = self.f.context.evaluate(self.f.branch, t, h)
            if not out.requires_grad:
                return out.to(a.dtype), torch.zeros_like(a), [torch.zeros_like(w) for w in self.wanted]
            if not self.checked:
                _check_leaves(out, (h, *self.wanted))
                self.checked = True
            found = torch.autograd.grad(out, (h, *self.wanted), -a.to(out.dtype), allow_unused=True)
        for_h, *rest = (
            torch.zeros_like(of) if g is None else g for g, of in zip(found, (h, *self.wanted), strict=True)
        )
        return out.detach().to(a.dtype), for_h.to(a.dtype), rest

    def flat(self, t: float | Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same for the state (h, a, g), of which g counts for nothing."""
        slope, slope_a, slopes_g = self(t, *state[:2])
        return slope, slope_a, *slopes_g


def solve_adjoint(scheme: Scheme, field: AdjointField, end: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor]]:
    """∂L/∂h at the scheme's start, and ∂L/∂θ, from the state ``end`` and ``a`` = ∂L/∂h at its end."""
    h, a, *gradients = (part.to(wide(part.dtype)) for part in (end, a, *(torch.zeros_like(w) for w in field.wanted)))
    if isinstance(scheme, FixedGrid):
        for start, stop in pairwise(reversed(scheme.grid)):
            field.f.context.begin_step(start, stop)
            h, a = _adjoint_step(field, scheme.tableau, start, stop, h, a, gradients)
        return a, gradients
    if isinstance(scheme, Adaptive):
        if not torch.isfinite(a).all():
            # As backpropagation gives: loss scaling that overflowed looks for this, and skips its step.
            return a * torch.nan, [g + torch.nan for g in gradients]
        state = (h, a, *gradients)
        for start, stop in pairwise(reversed(scheme.pieces())):
            field.f.context.begin_step(start, stop)
            state = scheme.solve_piece(TimeField(field.flat, start, stop), state)
        return state[1], list(state[2:])
    raise TypeError(f"no adjoint for a {type(scheme).__name__}")


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
