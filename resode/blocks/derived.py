"""Branches made of another branch: scaled, with parameters that vary with t, or held at one time."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.branch import Branch
from resode.blocks.varying import Layers, varying_layers
from resode.layers.basis import BASES, Basis
from resode.layers.factors import factorized, multiply_out
from resode.layers.norm import index_statistics


class Gain(nn.Module):
    """h ↦ factor·weight·h, with a ``weight`` of no dimension, or without one."""

    def __init__(self, factor: float, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.factor, self.weight = factor, weight

    def forward(self, h: Tensor) -> Tensor:
        return self.factor * h if self.weight is None else (self.factor * self.weight) * h

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class Scaled(nn.Module):
    """(t, h) ↦ α(t)·f(t, h), where f is a branch.

    Args:
        branch: f.
        gain: α, of which the weight may vary with t (stacked, see ``blocks.varying``) if there is a ``basis``.
    """

    def __init__(self, branch: nn.Module, gain: Gain, basis: Basis | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.gain = Layers([gain], basis)
        for part in (self, self.gain, gain):
            part.training = branch.training

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times at which f, or α, jumps or bends."""
        own = () if self.gain.basis is None else self.gain.basis.breakpoints
        return tuple(sorted({*getattr(self.branch, "breakpoints", ()), *own}))

    def set_span(self, t0: float, t1: float) -> None:
        """Let α, and what varies of f, span [``t0``, ``t1``]."""
        self.gain.set_span(t0, t1)
        if hasattr(self.branch, "set_span"):
            self.branch.set_span(t0, t1)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.gain.at(t, self.branch(t, h))


class Varying(nn.Module):
    """Any branch with parameters that vary with t: (t, h) ↦ f_θ(t)(t, h).

    Args:
        branch: f, whose parameters are stacked (see ``blocks.varying``).
        basis: how they vary.
    """

    def __init__(self, branch: nn.Module, basis: Basis) -> None:
        super().__init__()
        self.layers = _Whole([branch], basis)
        self.training = self.layers.training = branch.training

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times at which the parameters jump or bend."""
        return () if self.layers.basis is None else self.layers.basis.breakpoints

    def set_span(self, t0: float, t1: float) -> None:
        """Let the parameters vary over [``t0``, ``t1``]."""
        self.layers.set_span(t0, t1)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.layers.at(t, h)


class _Whole(Layers):
    """A whole branch as layers."""

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self[0](t, h)


class Held(nn.Module):
    """(t, h) ↦ f(t₀, h): a branch held at one time ``at``, so that the field does not depend on t."""

    def __init__(self, branch: nn.Module, at: float) -> None:
        super().__init__()
        self.branch, self.at = branch, at
        self.training = branch.training

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.branch(self.at, h)

    def extra_repr(self) -> str:
        return f"at={self.at:g}"


def frozen(branch: nn.Module, t: float, inside: float | None = None) -> nn.Module:
    """A copy of ``branch`` whose parameters and running statistics are those of time ``t``, and vary no more.

    Where time enters by other ways (a time channel, FiLM, a branch of the user's), the copy is to be called with it.
    Parameters that vary and are products of factors are multiplied out: the product at t is none of factors at t.

    Args:
        inside: the time by which a piece of parameters that are constant on pieces is chosen, such as the middle of a
            solver's step; ``t`` if None.
    """
    if any(factorized(layers) for layers in varying_layers(branch)):
        branch = copy.deepcopy(branch)
        for layers in varying_layers(branch):
            multiply_out(layers)
    instead: dict[int, Any] = {}  # what the copy holds in the place of a parameter, by the parameter's identity
    for layers in varying_layers(branch):
        basis = layers.basis
        terms = basis.terms(t if inside is None or basis.kind != "constant" else inside)
        for stacked in layers.parameters():
            value = _combined(stacked.detach(), terms)
            instead[id(stacked)] = nn.Parameter(value, requires_grad=stacked.requires_grad)
    made = copy.deepcopy(branch, instead)
    for layers in varying_layers(made):
        layers.basis = None
    for part in made.modules():
        if isinstance(part, Branch) and part.time in BASES:
            part.time = "none"
    index_statistics(made, (t,))
    return made


def _combined(stacked: Tensor, terms: list[tuple[int, float]]) -> Tensor:
    """Σ_k φ_k Θ_k as a tensor of its own."""
    (k, weight), *more = terms
    return torch.stack([weight * stacked[k], *(w * stacked[j] for j, w in more)]).sum(0)
