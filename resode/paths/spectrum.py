"""The exact path spectrum: the gradient of a network, sorted by the lengths of its paths.

With v the cotangent of the last state, and P_l, S_l and J_l the Jacobians of step l (of what follows its addition, of
its shortcut, of its branch), the gradient is the value at z = 1 of the polynomial

    vᵀ ∏_l P_l (S_l + z J_l),

whose coefficient of z^k is the sum over all paths through k branches: C(n, k) of them at n residual steps. Going back
through the steps with all coefficients in hand gives every one of them (:func:`gradient`):

    v_k ← S_lᵀ P_lᵀ v_k + J_lᵀ P_lᵀ v_{k−1}.

For an ODE net the v_k are the terms of the Dyson series of the adjoint equation, da_k/dt = −Jᵀ a_{k−1}, by the solver's
own step map: their sum is the discrete gradient to rounding, and for small steps each tends to its continuous
counterpart. With ``grade="evaluation"`` the length of a path is the number of evaluations of f that it goes through,
and the terms are of the solver's order; with ``grade="step"`` it is the number of solver's steps that the path does
not go round, and they are of order 1.

Veit, Wilber & Belongie 2016 (arXiv 1605.06431, section 4.3) sample single paths, and multiply the mean norm of their
gradients by their number (:func:`sampled`). This is another quantity. The gradients of the many paths of one length
point in many directions and cancel, so that the norm of their sum, which is what the gradient is made of, can be far
smaller. The parts of different lengths cancel, too: their norms add up to more than that of the gradient, and their
signed shares of it (``Spectrum.shares``) to 1.

Everything is computed in evaluation mode, and no gradient of any parameter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resode.dynamics import Map, ResidualDynamics, Step
from resode.errors import InvalidInput
from resode.layers.layout import is_channels_last
from resode.paths import lengths
from resode.paths.graded import Grade, GradedStep, plus
from resode.paths.linear import Vectors, default_together, stack
from resode.paths.passes import Loss, cotangent, differentiating, input_of, require_state, states_of
from resode.paths.singles import Sampled, paths, sampled

__all__ = ["Grade", "Loss", "Sampled", "Spectrum", "StepSpectra", "by_step", "gradient", "jvp", "paths", "sampled"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A gradient, or a response, as the sum of what paths of each length give to it.

    Args:
        parts: (K, *shape): of the paths of length 0, …, K − 1.
        rest: of all longer paths together, where they were not told apart; None if there are none.
        counts: the number of paths of every length, those in ``rest`` included.
        grade: what the length of a path counts within a solver's step.
    """

    parts: Tensor
    rest: Tensor | None
    counts: tuple[int, ...]
    grade: Grade

    @property
    def total(self) -> Tensor:
        """The sum of all: the gradient, or the whole response."""
        return plus(self.parts.sum(0), self.rest)

    @cached_property
    def sample_norms(self) -> Tensor:
        """(K, B): the norm of each part, for each sample by itself; in double precision."""
        return _sample_norms(self.parts)

    @property
    def norms(self) -> Tensor:
        """(K,): the norm of each part, as the mean over the samples."""
        return self.sample_norms.mean(1)

    @cached_property
    def shares(self) -> Tensor:
        """(K,): ⟨part, total⟩/⟨total, total⟩ over the whole batch, negative for a part that works against the total.

        They sum to 1, less the share of ``rest``. All are nan if the total is 0.
        """
        return _shares(self.parts, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: without the tensors, but with what they say of each length."""
        return {
            "grade": self.grade,
            "samples": self.parts.shape[1],
            "counts": list(self.counts),
            "norms": self.norms.tolist(),
            "shares": self.shares.tolist(),
            "norm": float(_sample_norms([self.total]).mean()),
            "rest": None if self.rest is None else float(_sample_norms([self.rest]).mean()),
        }


@dataclass(frozen=True, eq=False)
class StepSpectra:
    """The spectra of the gradients in every state of a network: which lengths of paths train which step.

    Args:
        labels: of each row: that of the step after the state; "head" for the last state.
        stages: of each row, the stage of that step; of the last, one more than any.
        norms: (L + 1, K): the norm of each part of each state's gradient, as the mean over the samples.
        shares: (L + 1, K): ⟨part, gradient⟩/⟨gradient, gradient⟩, as of :class:`Spectrum`.
        gradient_norms: (L + 1,): the norm of the gradient, as the mean over the samples.
        counts: of each row, the number of paths of each length from that state to the output.
        grade: what the length of a path counts within a solver's step.
    """

    labels: tuple[str, ...]
    stages: tuple[int, ...]
    norms: Tensor
    shares: Tensor
    gradient_norms: Tensor
    counts: tuple[tuple[int, ...], ...]
    grade: Grade

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "grade": self.grade,
            "labels": list(self.labels),
            "stages": list(self.stages),
            "norms": self.norms.tolist(),
            "shares": self.shares.tolist(),
            "gradient_norms": self.gradient_norms.tolist(),
            "counts": [list(row) for row in self.counts],
        }


def gradient(
    view: ResidualDynamics,
    x: Tensor,
    loss: Loss,
    max_length: int | None = None,
    grade: Grade = "step",
    at: int | None = None,
    *,
    together: int | None = None,
) -> Spectrum:
    """The gradient of ``loss(view(x))``, as the sum over paths of each length.

    Args:
        x: (B, …), in whatever order of memory; the parts have the same.
        loss: from the logits to one number, summed over the samples so that each has its own gradient.
        max_length: tell no longer paths apart: their sum is ``rest``, at the cost of one part more.
        grade: what the length of a path counts within a solver's step: "step" or "evaluation".
        at: with respect to the state before step ``at`` (after the last step, if it is their number); by default with
            respect to ``x``.
        together: how many parts share a backward pass; one on a CPU, where that is fastest, and elsewhere as many as
            fill a GPU. It changes nothing but time and memory.

    The forward pass is made once, and its L states are kept; each step is then evaluated once more, with the graph of
    that step alone. Memory holds one state for each length and those L.

    Raises:
        InvalidInput: for anything but a view, an argument outside its range, an ``x`` or a state that is not of
            floating-point numbers, a loss that is not one number or does not follow from the logits, or, with
            ``grade="evaluation"``, a solver's step whose branch was replaced.
    """
    x = input_of(view, x, at)
    counts, most = _lengths(view.steps[at or 0 :], max_length, grade)
    together = _checked_together(together, x)
    with differentiating(view, plain_attention=together > 1):
        for h, v in _backward(view, x, loss, grade, at, most, together):
            like, found = h, v
        return _spectrum(found, like, most, counts, grade)


def by_step(
    view: ResidualDynamics,
    x: Tensor,
    loss: Loss,
    max_length: int | None = None,
    grade: Grade = "step",
    *,
    together: int | None = None,
) -> StepSpectra:
    """The spectra of the gradients in all states, met in one backward pass; arguments as of :func:`gradient`.

    The gradient in the state after a step is what trains the branch of that step.
    """
    x = input_of(view, x, at=0)
    counts, most = _lengths(view.steps, max_length, grade)
    together = _checked_together(together, x)
    with differentiating(view, plain_attention=together > 1):
        rows = [_row(v, h, most, len(counts)) for h, v in _backward(view, x, loss, grade, 0, most, together)][::-1]
    stages = [step.stage for step in view.steps]
    return StepSpectra(
        labels=(*(step.label for step in view.steps), "head"),
        stages=(*stages, max(stages) + 1),
        norms=torch.stack([norms for norms, _, _ in rows]),
        shares=torch.stack([shares for _, shares, _ in rows]),
        gradient_norms=torch.stack([norm for _, _, norm in rows]),
        counts=lengths.counts_from_each(view, grade),
        grade=grade,
    )


def jvp(
    view: ResidualDynamics,
    x: Tensor,
    direction: Tensor,
    max_length: int | None = None,
    grade: Grade = "step",
    at: int | None = None,
    *,
    together: int | None = None,
) -> Spectrum:
    """The response of the logits to a perturbation of ``x``, as the sum over paths of each length.

    Forwards through the steps, u_k ← P_l (S_l u_k + J_l u_{k−1}): the parts are (K, B, classes), and their sum is the
    derivative of view(x + ε·direction) in ε at 0. For every k, ⟨v, part_k of the response to u⟩ = ⟨part_k of the
    gradient pulled back from v, u⟩.

    Args:
        direction: of the shape of ``x``; with ``at``, of the state before that step.

    Other arguments, and errors, are those of :func:`gradient`. Each J u passes through the graph of a backward pass
    (see ``paths.linear``), which costs more than a Jᵀv does.
    """
    x = input_of(view, x, at)
    counts, most = _lengths(view.steps[at or 0 :], max_length, grade)
    together = _checked_together(together, x)
    with differentiating(view, plain_attention=True):
        h = x if at is None else view.run(view.stem(x), 0, at)
        u: Vectors = [_checked_direction(direction, require_state(h, "the network"))]
        steps = view.steps[at or 0 :]
        for step in (*([_ungraded(view.stem)] if at is None else []), *steps, _ungraded(view.head)):
            graded = GradedStep(step, h, grade)
            u = graded.push(u, most, together)
            h = require_state(graded.value, f"step {step.label!r}")
        return _spectrum(u, h, most, counts, grade)


def _backward(
    view: ResidualDynamics, x: Tensor, loss: Loss, grade: Grade, at: int | None, most: int | None, together: int
) -> Iterator[tuple[Tensor, Vectors]]:
    """Each state and the polynomial of its cotangents, from the last to the one before step ``at`` (or ``x``).

    A polynomial is used up by the next.
    """
    states = states_of(view, x)
    v: Vectors = [cotangent(view, states[-1], loss)]
    yield states[-1], v
    for step in reversed(view.steps[at or 0 :]):
        states.pop()
        v = GradedStep(step, states[-1], grade).pull(v, most, together)
        yield states[-1], v
    if at is None:
        yield x, GradedStep(_ungraded(view.stem), x, grade).pull(v, most, together)


def _ungraded(map: Map) -> Step:
    """The stem or the head as a step that no path's length counts."""
    return Step(kind="transition", branch=lambda t, h: map(h))


def _lengths(steps: Sequence[Step], max_length: int | None, grade: Grade) -> tuple[tuple[int, ...], int | None]:
    """The number of paths of each length; the power of z that is to collect all longer ones, if any is."""
    counts = lengths.counts(steps, grade)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 0):
        raise InvalidInput(f"max_length is {max_length!r}: a number of branches, at least 0, is expected")
    return counts, None if max_length is None or max_length >= len(counts) - 1 else max_length + 1


def _checked_together(together: int | None, x: Tensor) -> int:
    if together is None:
        return default_together(x)
    if together < 1:
        raise InvalidInput(f"together is {together}: at least one part must be in a backward pass")
    return together


def _checked_direction(direction: Tensor, h: Tensor) -> Tensor:
    if direction.shape != h.shape:
        raise InvalidInput(
            f"the direction is of shape {tuple(direction.shape)}, and what it perturbs is of shape {tuple(h.shape)}"
        )
    return direction.to(h).detach()


def _spectrum(v: Vectors, like: Tensor, most: int | None, counts: tuple[int, ...], grade: Grade) -> Spectrum:
    width = len(counts) if most is None else most
    found = [torch.zeros_like(like) if part is None else part for part in [*v, *[None] * (width + 1 - len(v))]]
    return Spectrum(stack(found[:width]), None if most is None else found[most], counts, grade)


def _row(v: Vectors, like: Tensor, most: int | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and shares of one state's parts, and the norm of its gradient."""
    total = torch.zeros_like(like)
    for part in v:
        total = plus(total, part)
    parts = [part for part in v[:most] if part is not None]
    places = [k for k, part in enumerate(v[:most]) if part is not None]
    norms, shares = like.new_zeros(2, width if most is None else most, dtype=torch.float64)
    if parts:
        norms[places], shares[places] = _sample_norms(parts).mean(1), _shares(parts, total)
    return norms, shares, _sample_norms([total]).mean()


def _sample_norms(parts: Iterable[Tensor]) -> Tensor:
    """(K, B) from K tensors (B, …)."""
    return torch.stack([torch.linalg.vector_norm(_rows(part, part), dim=1) for part in parts])


def _shares(parts: Iterable[Tensor], total: Tensor) -> Tensor:
    """(K,) from K tensors (B, …) and one."""
    whole = _rows(total, total).flatten()
    return torch.stack([_rows(part, total).flatten() @ whole for part in parts]) / (whole @ whole)


def _rows(h: Tensor, like: Tensor) -> Tensor:
    """(B, N) in double precision, in the order of memory of ``like``: without a copy to another."""
    return (h.permute(0, 2, 3, 1) if is_channels_last(like) else h).double().reshape(len(h), -1)
