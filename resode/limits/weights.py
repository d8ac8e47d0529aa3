"""The weights of a step: what its branch depends on, as one vector."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resode.blocks.varying import varying_layers
from resode.dynamics import Increment, ResidualDynamics, Step
from resode.layers.context import Field, evaluate

Weights = list[Tensor]
"""Tensors whose entries make up the vector."""


def weights_of(step: Step, h: Tensor) -> Weights:
    """The parameters that the branch of ``step`` depends on; of those that vary with t, θ(t) at its time.

    Those of a branch whatever it is (a module, a function of some) are found in the graph of one evaluation at the
    state ``h``, in the order of that graph, which is the same for branches that do the same.
    """
    if isinstance(step.branch, Increment):
        return theta(step.branch.field, step.t)
    if isinstance(step.branch, nn.Module) and varying_layers(step.branch):
        return theta(step.branch, step.t)
    with torch.enable_grad():
        out = evaluate(step.branch, step.t, h.detach())
    return _leaves(out)


def theta(field: Field, t: float) -> Weights:
    """The parameters of ``field`` at time ``t``: those that vary with t, and the others."""
    if not isinstance(field, nn.Module):
        return []
    varying = varying_layers(field)
    stacked = {p for layers in varying for p in layers.parameters()}
    found = [p.detach() for p in field.parameters() if p not in stacked]
    for layers in varying:
        found += [value.detach() for value in layers.parameters_at(t).values()]
    return found


def norm(weights: Weights) -> float:
    """The Euclidean norm of all entries."""
    return sum(float(w.double().square().sum()) for w in weights) ** 0.5


def difference(after: Weights, before: Weights) -> float | None:
    """The norm of ``after`` − ``before``; None when they are not the weights of branches of one form."""
    if [w.shape for w in after] != [w.shape for w in before]:
        return None
    return norm([a.double() - b.double() for a, b in zip(after, before, strict=True)])


def norm_of_sum(all_weights: Sequence[Weights]) -> float:
    """The norm of the sum of weights of one form."""
    return norm([torch.stack([w.double() for w in same]).sum(0) for same in zip(*all_weights, strict=True)])


@contextmanager
def tracing(view: ResidualDynamics) -> Iterator[None]:
    """All parameters of the model ask for gradients, so that graphs lead to them; restored afterwards."""
    parameters = [] if view.model is None else [p for p in view.model.parameters() if p.is_floating_point()]
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _leaves(out: Tensor) -> Weights:
    """The leaves of the graph of ``out``, each once, in depth-first order."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), node.variable.detach())
        waiting += [before for before, _ in reversed(node.next_functions)]
    return list(found.values())
