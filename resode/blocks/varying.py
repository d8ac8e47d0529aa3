"""Layers whose parameters vary with t: θ(t) = Σ_k φ_k(t) Θ_k, on a basis of ``layers.basis``.

Each parameter p of the layers is stacked: one parameter of shape (K, *p.shape) under the same name in the same layer.
An evaluation puts θ(t) in its place for the time of the call, as ``torch.func.functional_call`` does (which loses a
parameter of a layer that stands in two places), so that a layer sees weights of the shape it was made with and knows
nothing of t, while optimizers, copies and ``state_dict`` see parameters like any other.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from resode.errors import InvalidInput
from resode.layers.basis import Basis
from resode.layers.context import SolveContext, current, interval_time
from resode.layers.conv import Conv2d, Linear
from resode.layers.factors import factorized, factors_of
from resode.layers.modulation import FiLM


class Layers(nn.ModuleList):
    """Layers one after the other, whose parameters may vary with t.

    ``layers(t, h)`` applies them with the parameters they hold; :meth:`at` with those at time t.

    Args:
        layers: those that take t (a time channel, FiLM) are given it.
        basis: how the parameters, which must be stacked by :func:`stack_parameters` then, vary; None if they do not.
    """

    def __init__(self, layers: Iterable[nn.Module] = (), basis: Basis | None = None) -> None:
        super().__init__(layers)
        self.basis = basis

    def set_span(self, t0: float, t1: float) -> None:
        """Let the basis, if there is one, span [``t0``, ``t1``]."""
        if self.basis is not None:
            self.basis = replace(self.basis, t0=t0, t1=t1)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, t) if isinstance(layer, Conv2d | Linear | FiLM) else layer(h)
        return h

    def at(self, t: float | Tensor, h: Tensor) -> Tensor:
        """The layers with their parameters at time ``t``, applied to ``h``.

        Args:
            t: a float, or a tensor of no dimension, whose value is not asked for: all Θ_k are summed up then.
        """
        if self.basis is None:
            return self(t, h)
        theta = self.parameters_at(t)  # before the context is told that parameters vary: the Θ_k do not
        with _in_place(self, theta), _varying(current()):
            return self(t, h)

    def parameters_at(self, t: float | Tensor) -> dict[str, Tensor]:
        """θ(t) by the names of the parameters, for layers with a basis.

        Of one that is a product of factors (``layers.factors``), Θ_k is the product, whose θ(t) has the name of the
        first; the second has none. A basis of pieces is asked at the middle of the solver's step (see
        ``layers.context.interval_time``).
        """
        context = current()
        if self.basis.kind == "constant":
            t = interval_time(t)
        # A step that is to be traced is evaluated as its graph will be, for a t that is not known.
        traced = isinstance(t, Tensor) or (context is not None and context.inputs is not None)
        if not traced and self.basis.kind != "fourier":
            return self._from_few(self.basis.terms(t))
        if not isinstance(t, Tensor):
            like = next(self.parameters(), torch.empty(()))
            # Filled on the device: nothing has to be copied there.
            t = torch.full((), t, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        values = self.basis.values(t)
        return {name: _sum(values, stacked) for name, stacked in self._stacked().items()}

    def _stacked(self) -> dict[str, Tensor]:
        """The stacked parameters by name; of a product of factors, the product by the name of the first."""
        stacked: dict[str, Tensor] = dict(self.named_parameters())
        names = {parameter: name for name, parameter in stacked.items()}
        for layer, own in factorized(self):
            a, b = (names[factor] for factor in factors_of(layer, own))
            stacked[a] = getattr(layer, own)
            del stacked[b]
        return stacked

    def _from_few(self, terms: list[tuple[int, float]]) -> dict[str, Tensor]:
        (k, _), *more = terms
        slices = self._slices([k for k, _ in terms])
        if not more:
            return slices[k]
        ((other, weight),) = more
        return {name: torch.lerp(one, slices[other][name], weight) for name, one in slices[k].items()}

    def _slices(self, wanted: list[int]) -> dict[int, dict[str, Tensor]]:
        context = current()
        stacked = self._stacked()
        if context is None:
            return {k: {name: parameter[k] for name, parameter in stacked.items()} for k in wanted}
        context.derive(self, "all", partial(self._split, context))
        return {
            k: {
                name: context.derive(self, (name, k), partial(torch.select, parameter, 0, k))
                for name, parameter in stacked.items()
            }
            for k in wanted
        }

    def _split(self, context: SolveContext) -> Tensor:
        # One unbind, whose backward pass is one stack, where K selections would each fill a gradient of the whole. And
        # all at once, since a backward solve may meet a knot that no stage of the forward solve did.
        for name, parameter in self._stacked().items():
            for k, part in enumerate(parameter.unbind()):
                context.derive(self, (name, k), lambda part=part: part)
        return torch.empty(0)


def stack_parameters(modules: Sequence[nn.Module], knots: int) -> nn.Module:
    """The first of equal ``modules``, with its parameters stacked: Θ_k is the parameter of module k.

    Beyond the last module Θ_k is 0. Buffers stay those of the first.

    Args:
        modules: at most ``knots`` modules of the same layers.
        knots: K.

    Raises:
        InvalidInput: when there are more modules than knots, or their parameters differ in name or shape.
    """
    first = modules[0]
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in modules]
    if len(modules) > knots or any(shape != shapes[0] for shape in shapes):
        raise InvalidInput(
            f"{len(modules)} modules for {knots} knots: at most one a knot, with parameters of the same names and "
            "shapes, can be stacked"
        )
    stacked: dict[nn.Parameter, nn.Parameter] = {}  # one that stands in several places stays one
    for name, parameter in list(first.named_parameters(remove_duplicate=False)):
        if parameter not in stacked:
            held = [module.get_parameter(name).detach() for module in modules]
            held += [torch.zeros_like(parameter)] * (knots - len(modules))
            stacked[parameter] = nn.Parameter(torch.stack(held), requires_grad=parameter.requires_grad)
        owner, _, own = name.rpartition(".")
        setattr(first.get_submodule(owner), own, stacked[parameter])
    return first


def varying_layers(model: nn.Module) -> list[Layers]:
    """The layers in ``model`` whose parameters vary with t."""
    return [layers for layers in model.modules() if isinstance(layers, Layers) and layers.basis is not None]


def drawn_values(model: nn.Module) -> dict[nn.Parameter, list[Tensor]]:
    """What an initialization should draw of the stacked parameters in ``model``: a view of each of these Θ_k.

    They are every Θ_k of the bases of pieces and knots, and Θ_0 of the Fourier basis, whose others are 0 at first, so
    that θ is constant at first.
    """
    return {
        stacked: list(stacked.detach()[: drawn_knots(layers.basis)].unbind())
        for layers in varying_layers(model)
        for stacked in layers.parameters()
    }


def drawn_knots(basis: Basis) -> int:
    """How many of the Θ_k are drawn at random at first; those beyond are 0."""
    return 1 if basis.kind == "fourier" else basis.knots


def _sum(values: Tensor, stacked: Tensor) -> Tensor:
    """Σ_k values_k·stacked_k, in the precision of ``stacked`` (autocast would round the weights of norms, too)."""
    with torch.autocast(stacked.device.type, enabled=False):
        return torch.tensordot(values.to(stacked), stacked, 1)


@contextmanager
def _in_place(layers: Layers, theta: dict[str, Tensor]) -> Iterator[None]:
    """``theta`` in the place of the parameters of these names, wherever one stands (in shared layers, too)."""
    instead = {parameter: theta.get(name) for name, parameter in layers.named_parameters()}
    places = [(m._parameters, own, p) for m in layers.modules() for own, p in m._parameters.items() if p is not None]
    try:
        for parameters, own, parameter in places:
            parameters[own] = instead[parameter]
        yield
    finally:
        for parameters, own, parameter in places:
            parameters[own] = parameter


@contextmanager
def _varying(context: SolveContext | None) -> Iterator[None]:
    """Nothing that a layer derives from its parameters holds for the rest of the solve."""
    if context is None:
        yield
        return
    before, context.weights_vary = context.weights_vary, True
    try:
        yield
    finally:
        context.weights_vary = before
