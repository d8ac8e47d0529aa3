"""The context of a solve: everything that must stay fixed while a branch is evaluated many times.

A solver is right only if the branch it integrates is a function of (t, h) and of nothing else. Dropout masks,
tensors derived from the weights (standardized weights, the maps t·K of a time channel), the training flags and the
batch statistics gathered on the way therefore belong to one :class:`SolveContext`, made when a solve begins and held
by whoever may evaluate the branch again (an adjoint's backward pass, for one). Nothing of it is kept on a module, so
two forwards followed by two backwards, one block used twice in a net, and a deep copy between them are all right.

Layers find the context of the evaluation they are part of by :func:`current`; outside a solve it is ``None``.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from resode.errors import InvalidInput

P, R = ParamSpec("P"), TypeVar("R")
Field = Callable[[float | Tensor, Tensor], Tensor]
"""A vector field ``f(t, h)``, with the shape of ``h``."""

Draw = Callable[[Tensor], Tensor]
"""Makes a random mask for a tensor, from its shape, layout, type and device."""

_current: ContextVar["SolveContext | None"] = ContextVar("resode_solve_context", default=None)


def current() -> "SolveContext | None":
    """The context of the solve whose branch is being evaluated now, or None outside a solve."""
    return _current.get()


class Absorbs(Protocol):
    """A layer that takes the batch moments of a whole solve at its end (our batch norm)."""

    def absorb(self, times: list[float], means: list[Tensor], variances: list[Tensor], whole: bool) -> None: ...


@dataclass(frozen=True)
class Moments:
    """Mean and unbiased variance of one batch, met by ``layer`` in an evaluation at time ``t``."""

    layer: Absorbs
    t: float | Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class MaskInput:
    """The mask of the ``use``-th use of ``module`` within one evaluation."""

    module: object
    use: int


@dataclass(frozen=True)
class DerivedInput:
    """What :meth:`SolveContext.derive` keeps for ``module`` under ``name``."""

    module: nn.Module
    name: object


def outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """Keep ``method`` out of torch.compile's graphs: Dynamo takes one module that is a key of a dict for another."""
    opaque = torch.compiler.disable(method)

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (opaque if torch.compiler.is_compiling() else method)(*args, **kwargs)

    return call


class SolveContext:
    """What one solve from ``t0`` to ``t1`` holds fixed.

    Args:
        t0, t1: ends of the interval of integration.
        mask_intervals: random masks are drawn once for each of this many equal intervals of [t0, t1]; 1 is once
            per solve.
        detached: derived tensors are handed to the branch as leaves, whose gradients a custom backward pass
            collects and sends on to the parameters with :meth:`derived_gradients`. Otherwise (backpropagation)
            they are part of the ordinary graph.
        single: the branch will be evaluated once, so that a layer may update its statistics as it goes.

    ``recording`` says whether moments count, and ``whole`` that those gathered stand for all of [t0, t1]; otherwise
    only the knots near them are updated. ``inputs``, if a dict, takes note of what the evaluations ask this context
    for, and how to make it in another solve (see ``blocks.compiled``).
    """

    def __init__(
        self,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        mask_intervals: int = 1,
        detached: bool = False,
        single: bool = False,
    ) -> None:
        self.t0, self.t1 = t0, t1
        self.mask_intervals = mask_intervals
        self.detached = detached
        self.single = single
        self.recording = True
        self.whole = not single
        self.weights_vary = False
        self.inputs: dict[MaskInput | DerivedInput, Any] | None = None
        self.t: float | Tensor = t0
        self._step: tuple[float | Tensor, float | Tensor] | None = None
        self._uses: dict[object, int] = {}
        self._masks: dict[tuple[object, int, int], Tensor] = {}
        self._derived: dict[tuple[nn.Module, object], tuple[Tensor, Tensor]] = {}
        self._deriving = False
        self._training: dict[nn.Module, bool] = {}
        self._trial: list[Moments] = []
        self._accepted: list[Moments] = []

    # --- evaluating the branch -----------------------------------------------------------------------------------

    def evaluate(self, branch: Field, t: float | Tensor, h: Tensor) -> Tensor:
        """``branch(t, h)``, with this context in force.

        Raises:
            InvalidInput: when the branch changes ``h`` in place: the sum h + Δ·f(t, h) would be of another h.
        """
        self.t = t
        self._uses.clear()
        token = _current.set(self)
        try:
            return _unchanged(branch, t, h)
        finally:
            _current.reset(token)

    def begin_step(self, start: float | Tensor, end: float | Tensor) -> None:
        """Say that the evaluations to come are stages of the step from ``start`` to ``end``."""
        self._step = (start, end)
        self._trial.clear()

    def interval_time(self, t: float | Tensor) -> float | Tensor:
        """A time strictly inside the step being made: its middle (``t`` itself outside a step).

        Weights and masks that are constant on pieces are chosen by this time, so that every stage of a step uses
        the step's own piece: the left limit at its end. Otherwise the order of a solver falls to 1.
        """
        return _number(t) if self._step is None else 0.5 * (self._step[0] + self._step[1])

    @outside_graphs
    def is_training(self, module: nn.Module) -> bool:
        """``module.training`` as it was when this solve first met the module."""
        return self._training.setdefault(module, module.training)

    # --- randomness ----------------------------------------------------------------------------------------------

    @outside_graphs
    def mask(self, module: object, draw: Draw, like: Tensor) -> Tensor:
        """The mask of ``module`` in the present mask interval; ``draw(like)`` makes it the first time.

        A module used several times within one evaluation has a mask for each use. A mask depends on the shape, layout,
        type and device of ``like`` alone.
        """
        use = self._uses.get(module, 0)
        self._uses[module] = use + 1
        if self.inputs is not None:
            made_for = (tuple(like.shape), like.stride(), like.dtype, like.device)
            self.inputs.setdefault(MaskInput(module, use), (draw, *made_for))
        return self.mask_of(MaskInput(module, use), draw, like)

    def mask_of(self, name: "MaskInput", draw: Draw, like: Tensor) -> Tensor:
        """The mask called ``name`` in the present mask interval."""
        key = (name.module, name.use, self.mask_interval)
        if key not in self._masks:
            self._masks[key] = draw(like)
        return self._masks[key]

    @property
    def mask_interval(self) -> int:
        """Index of the mask interval in which the present step lies."""
        if self.mask_intervals == 1:
            return 0
        share = (float(self.interval_time(self.t)) - self.t0) / (self.t1 - self.t0)
        return min(max(int(share * self.mask_intervals), 0), self.mask_intervals - 1)

    # --- tensors derived from parameters -------------------------------------------------------------------------

    @outside_graphs
    def derive(self, module: nn.Module, name: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on the parameters of ``module`` alone, computed once in this solve.

        While ``weights_vary`` (the parameters stand for values at one t), it is computed each time. Within ``make``
        what else was derived is part of its graph, and no leaf: gradients pass through it to the parameters.
        """
        if self.weights_vary:
            return make()
        if self.inputs is not None:
            self.inputs.setdefault(DerivedInput(module, name), make)
        key = (module, name)
        if key not in self._derived:
            before, self._deriving = self._deriving, True
            try:
                with torch.set_grad_enabled(self.detached or torch.is_grad_enabled()):
                    value = make()
            finally:
                self._deriving = before
            leaf = value.detach().requires_grad_(value.requires_grad) if self.detached else value
            self._derived[key] = (value, leaf)
        value, leaf = self._derived[key]
        return value if self._deriving else leaf

    def derived_leaves(self) -> list[Tensor]:
        """The leaves (see ``detached``) that need a gradient."""
        return [leaf for _, leaf in self._derived.values() if leaf.requires_grad]

    def derived_gradients(self, parameters: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
        """Send the ``cotangents`` of :meth:`derived_leaves` on to the ``parameters``."""
        values = [value for value, leaf in self._derived.values() if leaf.requires_grad]
        if not values:
            return [None] * len(parameters)
        # The small graph from parameters to derived tensors is kept: the pieces of one trajectory share it.
        return list(torch.autograd.grad(values, parameters, cotangents, allow_unused=True, retain_graph=True))

    # --- batch statistics ----------------------------------------------------------------------------------------

    @outside_graphs
    def record(self, moments: Moments) -> None:
        """Note the moments of a batch; they count once the step they belong to is accepted."""
        if self.recording:
            self._trial.append(moments)

    def accept_step(self) -> None:
        """The step's end was accepted: what its stages recorded will count."""
        self._accepted += self._trial
        self._trial.clear()

    @outside_graphs
    def commit(self) -> None:
        """End the forward solve: every layer absorbs, once, the moments of the accepted steps."""
        by_layer: dict[Absorbs, list[Moments]] = {}
        for moments in self._accepted:
            by_layer.setdefault(moments.layer, []).append(moments)
        for layer, met in by_layer.items():
            moments = [m.mean for m in met], [m.variance for m in met]
            layer.absorb([float(m.t) for m in met], *moments, whole=self.whole)
        self._accepted.clear()
        self.recording = False


def _unchanged(branch: Field, t: float | Tensor, h: Tensor) -> Tensor:
    """``branch(t, h)``, which has to leave ``h`` as it is."""
    version = _version(h)
    out = branch(t, h)
    if _version(h) != version:
        raise InvalidInput(
            "the branch changes the state it is given in place (an activation with inplace=True, first of its "
            "layers?), and the sum h + f(t, h) needs the state as it was: use inplace=False"
        )
    return out


def _version(h: Tensor) -> int | None:
    return None if h.is_inference() else h._version


def evaluate(branch: Field, t: float | Tensor, h: Tensor) -> Tensor:
    """``branch(t, h)`` once, outside any solver: masks are drawn for this call, statistics updated by it.

    Inside a solve the branch is part of that solve, and its context stays in force. What is evaluated once needs a
    context only to tell batch norms that are indexed by time which time it is: torch.compile, whose graphs a context
    breaks, does without where there is none of these.
    """
    compiling = torch.compiler.is_compiling()
    if current() is not None:
        return branch(t, h) if compiling else _unchanged(branch, t, h)
    if compiling and not _asks_for_time(branch):
        return branch(t, h)
    context = SolveContext(single=True)
    out = context.evaluate(branch, t, h)
    context.accept_step()
    context.commit()
    return out


def _asks_for_time(branch: Field) -> bool:
    """Whether a layer of ``branch`` needs to know the time without being given it; unknown of what is no module."""
    if not isinstance(branch, nn.Module):
        return True
    return any(getattr(layer, "indexed_by_time", False) for layer in branch.modules())


def interval_time(t: float | Tensor) -> float | Tensor:
    """For a branch with weights that are constant on pieces: the time by which to choose the piece.

    Such a branch lists the ends of its pieces in an attribute ``breakpoints`` (times in (t0, t1)). See
    :meth:`SolveContext.interval_time`.
    """
    context = current()
    return _number(t) if context is None else context.interval_time(t)


def _number(t: float | Tensor) -> float | Tensor:
    # While a step is traced a time is a tensor whose value is not known; it stays one.
    return t if isinstance(t, Tensor) else float(t)
