"""Gradient modes: how a solve is differentiated.

============== ============================================ ==================== ====================================
mode           what it differentiates                       memory               source
============== ============================================ ==================== ====================================
backprop       the solver's own steps                       all stages
checkpoint     the same, each step recomputed               the states at steps  Griewank & Walther 2000
reversible     another scheme's own steps, reconstructed    constant             McCallum & Foster 2024, 2410.11648
adjoint        the continuous problem, solved backward      constant             Chen et al. 2018, 1806.07366
============== ============================================ ==================== ====================================

``backprop`` and ``checkpoint`` give the exact gradient of the discrete solve, and agree to rounding. ``reversible`` is
exact for its own solve, which is another one of the same order. ``adjoint`` differs from them by the order of the
solver. Double backward and forward-mode differentiation work with ``backprop``; elsewhere they are an error.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from resode.blocks.solvers import RungeKutta, Scheme, Solve, State
from resode.errors import InvalidInput
from resode.layers.context import Field


class Mode(Protocol):
    """A gradient mode of one solve, but for backprop, which autograd has."""

    name: str

    def forward(self, f: Solve, scheme: Scheme, state: State) -> tuple[State, State]:
        """The state at the end, from ``state`` at the start, and the tensors that the backward pass needs."""
        ...

    def evaluate(self, f: Solve, scheme: Scheme, state: State) -> State:
        """The same state at the end, with nothing kept: there will be no backward pass."""
        ...

    def backward(self, f: Solve, scheme: Scheme, kept: State, cotangent: State, gradients: "Gradients") -> State:
        """The cotangent at the start, from that at the end; those of ``gradients.wanted`` are added there."""
        ...


class Gradients:
    """∂L/∂θ for the tensors ``wanted``, summed up over the pieces of a solve (in at least float32)."""

    def __init__(self, wanted: Sequence[Tensor]) -> None:
        self.wanted = tuple(wanted)
        self.sums: list[Tensor | None] = [None for _ in self.wanted]
        self.checked = False

    def check(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """The first time: that ``outputs`` depend on no leaf but ``inputs`` and those wanted.

        Raises:
            InvalidInput: when they do: that leaf would get no gradient, without a word.
        """
        if not self.checked:
            _check_leaves(outputs, (*inputs, *self.wanted))
            self.checked = True

    def add(self, found: Sequence[Tensor | None]) -> None:
        """Add one gradient for each of ``wanted`` (None: zero)."""
        for i, g in enumerate(found):
            if g is None:
                continue
            held = self.sums[i]
            # The first is copied: autograd may hand out one tensor as the gradient of several.
            self.sums[i] = g.to(wide(g.dtype), copy=True) if held is None else held.add_(g)

    def final(self) -> list[Tensor]:
        """The sums, in the types of ``wanted``."""
        return [
            torch.zeros_like(w) if g is None else g.to(w.dtype) for w, g in zip(self.wanted, self.sums, strict=True)
        ]


def integrate(f: Solve, scheme: Scheme, state: State, mode: Mode | None, parameters: Sequence[Tensor]) -> State:
    """The state at the end of ``scheme``, from ``state`` at its start, differentiable as ``mode`` says.

    Args:
        mode: None for backpropagation.
        parameters: the tensors, besides ``state``, to which ``f`` passes gradients.

    Raises:
        InvalidInput: for a mode other than backprop in forward mode or under a transform of torch.func; in its
            backward pass, when the branch depends on other tensors than its state and ``parameters``; and when its
            gradient is differentiated.
    """
    if mode is None:
        return scheme.integrate(f, state, RungeKutta(scheme.tableau))
    if forward_ad._current_level >= 0:  # with gradients off, too: a tangent of the weights would be lost, unsaid
        raise InvalidInput(f"gradient={mode.name!r} has no forward mode: use gradient='backprop'")
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*state, *parameters))):
        return mode.evaluate(f, scheme, state)
    if torch._C._are_functorch_transforms_active():
        raise InvalidInput(f"gradient={mode.name!r} does not go with torch.func's transforms: use gradient='backprop'")
    return _Solved.apply(f, scheme, mode, len(state), *state, *parameters)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of a state whose branch computes in ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager:
    # Without the cache of cast weights: a weight cast where gradients are off would be found again where they are on.
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Solved(torch.autograd.Function):
    """A whole solve as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, f: Solve, scheme: Scheme, mode: Mode, parts: int, *tensors: Tensor) -> State:
        device = tensors[0].device.type
        ctx.f, ctx.scheme, ctx.mode, ctx.parts = f, scheme, mode, parts
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        with _autocast(*ctx.autocast):
            # Detached, as every later state is: a compiled step is not compiled once more for the first.
            end, kept = mode.forward(f, scheme, tuple(part.detach() for part in tensors[:parts]))
        ctx.kept, ctx.parameters = len(kept), tensors[parts:]
        ctx.save_for_backward(*kept, *tensors[parts:])
        return tuple(part.view_as(part) for part in end)  # a part that was not changed is an input

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _Solved.gradients(ctx, cotangents)
        if torch.is_grad_enabled():  # as they are when these gradients shall be differentiated (create_graph=True)
            gradients = _Once.apply(ctx.mode.name, *(g.requires_grad_() for g in gradients))
        return None, None, None, None, *gradients

    @staticmethod
    def gradients(ctx: Any, cotangents: State) -> list[Tensor]:
        """∂L/∂state at the start, and ∂L/∂θ for the parameters."""
        # Reading them checks their versions; but those of the parameters may be copies (saved_tensors_hooks).
        kept, parameters = ctx.saved_tensors[: ctx.kept], list(ctx.parameters)
        f: Solve = ctx.f
        _check_same(parameters, f.branch)
        leaves = f.context.derived_leaves()
        found = Gradients((*parameters, *leaves))
        f.backward = True
        with _autocast(*ctx.autocast):
            start = ctx.mode.backward(f, ctx.scheme, kept, cotangents, found)
        final = found.final()
        derived = f.context.derived_gradients(parameters, final[len(parameters) :])
        return [*start, *(g if d is None else g + d for g, d in zip(final, derived, strict=False))]


class _Once(torch.autograd.Function):
    """The identity, with an error for a derivative.

    torch's ``once_differentiable`` is silent where the cotangent needs no gradient: a penalty on ∂L/∂h would then have
    no effect.
    """

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> State:
        ctx.name = name
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise InvalidInput(f"gradient={ctx.name!r} cannot be differentiated twice: use gradient='backprop'")


def vjp(outputs: State, inputs: State, cotangent: State, gradients: Gradients) -> State:
    """Pull ``cotangent`` back from ``outputs`` to ``inputs`` (returned) and to ``gradients.wanted`` (added there)."""
    through = [(out, g) for out, g in zip(outputs, cotangent, strict=True) if out.requires_grad]
    if not through:
        return tuple(torch.zeros_like(part) for part in inputs)
    gradients.check([out for out, _ in through], inputs)
    found = torch.autograd.grad(
        [out for out, _ in through],
        (*inputs, *gradients.wanted),
        [g.to(out.dtype) for out, g in through],
        allow_unused=True,
    )
    gradients.add(found[len(inputs) :])
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=False))


def leaves_of(state: State) -> State:
    """``state`` as leaves of a new graph."""
    return tuple(part.detach().requires_grad_() for part in state)


def _check_same(parameters: Sequence[Tensor], branch: Field) -> None:
    # The backward pass evaluates the branch again, with whatever parameters it holds by then.
    held = {id(p) for p in branch.parameters()} if isinstance(branch, nn.Module) else None
    if held is not None and any(id(p) not in held for p in parameters):
        raise InvalidInput(
            "the branch no longer holds the parameters it had in the forward pass (torch.func.functional_call puts "
            "others in for the time of a call): use gradient='backprop'"
        )


def _check_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    known_ids, seen, to_see = {id(tensor) for tensor in known}, set(), [out.grad_fn for out in outputs]
    while to_see:
        node = to_see.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise InvalidInput(
                f"the branch depends on a tensor of shape {tuple(leaf.shape)} that needs a gradient and is none of its "
                "parameters: only gradient='backprop' would give it one; register it in the branch, or use that"
            )
        to_see += (following for following, _ in node.next_functions)
