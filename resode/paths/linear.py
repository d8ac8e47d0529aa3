"""The derivative J of a map at a point, applied to many vectors: Jᵀv backwards, J u forwards.

One evaluation of the map makes the graph, and every product is one pass through it. For a ResNet's block on a CPU,
such a loop is the fastest of the ways to apply J to K vectors: the map evaluated on K copies of its point costs K
evaluations more, and a backward pass vectorized over K (``is_grads_batched``) has larger tensors to read and write and
gains nothing. On a GPU, which small batches leave idle, ``together`` says how many vectors share a pass.

J u is made by transposing twice: c ↦ Jᵀc is linear, and so its own derivative, and the transpose of that, taken by
autograd in the graph of the backward pass, is J. This is exact, uses the same graph for all u, and needs of each layer
that its backward pass can be differentiated. Forward-mode AD would evaluate the map once more for every vector, is no
faster for it with batch or group norm, and has no formula in many a layer of a user's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resode.dynamics import Map
from resode.dynamics.step import identity
from resode.layers.layout import is_channels_last

Vectors = list[Tensor | None]
"""Vectors of one shape, such as the coefficients of a polynomial; None is zero."""

GPU_IMAGES = 4096
"""Vectors times batch that one pass on a GPU is given, by default."""


def default_together(x: Tensor) -> int:
    """How many vectors to put through one pass: one on a CPU; elsewhere as many as make up GPU_IMAGES with a batch."""
    return 1 if x.device.type == "cpu" else max(1, GPU_IMAGES // max(1, len(x)))


class Linear:
    """The derivative J of ``map`` at ``h``.

    ``value`` is map(h), outside any graph. The map is given a copy of h, which it may overwrite.
    """

    def __init__(self, map: Map, h: Tensor) -> None:
        with torch.enable_grad():
            self._at = h.detach().requires_grad_()
            self._value = map(self._at.clone())
        self.value = self._value.detach()
        self._transposed: tuple[Tensor, Tensor] | None = None

    @property
    def is_zero(self) -> bool:
        """Whether map(h) is known not to depend on h."""
        return not self._value.requires_grad

    def pull(self, vectors: Vectors) -> Vectors:
        """Jᵀv for each of ``vectors``, which have the shape of ``value``, in one pass for all of them."""
        return [None] * len(vectors) if self.is_zero else _products(self._value, self._at, vectors)

    def push(self, vectors: Vectors) -> Vectors:
        """J u for each of ``vectors``, which have the shape of h, in one pass for all of them."""
        if self.is_zero:
            return [None] * len(vectors)
        if self._transposed is None:
            with torch.enable_grad():
                c = torch.zeros_like(self._value, requires_grad=True)
                (pulled,) = torch.autograd.grad(
                    self._value, self._at, c, create_graph=True, allow_unused=True, materialize_grads=True
                )
            self._transposed = c, pulled
        c, pulled = self._transposed
        return _products(pulled, c, vectors) if pulled.requires_grad else [None] * len(vectors)


class Identity:
    """The derivative of the identity, with the face of :class:`Linear`."""

    def __init__(self, h: Tensor) -> None:
        self.value = h

    def pull(self, vectors: Vectors) -> Vectors:
        return vectors

    push = pull


class Zero:
    """The derivative of a constant, with the face of :class:`Linear`."""

    def pull(self, vectors: Vectors) -> Vectors:
        return [None] * len(vectors)

    push = pull


def linearize(map: Map, h: Tensor) -> Linear | Identity:
    """The derivative of ``map`` at ``h``; nothing is evaluated for the identity."""
    return Identity(h) if map is identity or type(map) is nn.Identity else Linear(map, h)


def stack(vectors: Sequence[Tensor]) -> Tensor:
    """(K, *shape) from K tensors of one shape, each of which keeps its order in memory."""
    if is_channels_last(vectors[0]):
        return torch.stack([v.permute(0, 2, 3, 1) for v in vectors]).permute(0, 1, 4, 2, 3)
    return torch.stack(list(vectors))


def _products(outputs: Tensor, inputs: Tensor, vectors: Vectors) -> Vectors:
    """The gradient of ⟨outputs, v⟩ in ``inputs`` for each v."""
    found: Vectors = [None] * len(vectors)
    places = [k for k, v in enumerate(vectors) if v is not None]
    if len(places) == 1:
        (place,) = places
        (found[place],) = torch.autograd.grad(outputs, inputs, vectors[place], retain_graph=True, allow_unused=True)
    elif places:
        (batched,) = torch.autograd.grad(
            outputs,
            inputs,
            stack([vectors[k] for k in places]),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        if batched is not None:
            for place, product in zip(places, batched.unbind(), strict=True):
                found[place] = product
    return found
