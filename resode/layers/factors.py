"""Weights that are products of two factors: w = a ⊙ b, each factor a parameter.

A factorized tensor of a layer is read as before (``layer.weight`` is a ⊙ b) by torch's parametrization, so that layers,
branches and solvers know nothing of it; optimizers, copies and ``state_dict`` see a and b.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resode.errors import InvalidInput
from resode.layers.context import current

Place = tuple[nn.Module, str]
"""A module and the name of one of its tensors."""


class Factors(nn.Module):
    """a, b ↦ a ⊙ b; inside a solve made once, as all that depends on weights alone.

    Args:
        order: the names of the layer's parameters before, in their order.
    """

    def __init__(self, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.order = order

    def forward(self, a: Tensor, b: Tensor | None) -> Tensor:
        """a ⊙ b; ``a`` alone stands for the product, where a layer is given weights at one t (``b`` is None)."""
        if b is None:
            return a
        context = current()
        return a * b if context is None else context.derive(self, "product", lambda: a * b)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """a and b with a ⊙ b = w and b² − a² = 2δ, where 2δ is the mean of |w|, zeros left out.

        Of one size, a = ±b, they would stay so in every step, since the gradients g·b and g·a of a loss and the decay
        of both are: w could then shrink to 0, but never change its sign, and never leave 0. With b > |a| it can: a
        passes 0 while b does not. The difference decays as fast as decay itself makes weights smaller, so that in the
        end |a| = |b|, as at the minimum of a² + b² for their product. Where all of w is 0, 2δ is 1/√(fan-in).
        """
        size = w.abs()
        others = size[size > 0]
        delta = 0.5 * (others.mean() if len(others) else size.new_tensor(max(w[0].numel(), 1) ** -0.5))
        b = (torch.hypot(w, delta.expand_as(w)) + delta).sqrt()
        return w / b, b


def factorized(model: nn.Module) -> list[Place]:
    """Where ``model`` holds products of factors."""
    return [
        (module, name)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, parts in module.parametrizations.items()
        if isinstance(parts[0], Factors)
    ]


def factors_of(module: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """a and b of a factorized tensor."""
    held = module.parametrizations[name]
    return held.original0, held.original1


def multiply_out(model: nn.Module) -> None:
    """Put each product of factors in the place of its factors, as a parameter, in place.

    A model without factors is left as it is. An optimizer of the factors is of no more use.

    Raises:
        InvalidInput: when the layer of a product has parametrizations of another kind, too.
    """
    products: dict[nn.Module, list[str]] = {}
    for layer, name in factorized(model):
        products.setdefault(layer, []).append(name)
    for layer, names in products.items():
        if len(names) < len(layer.parametrizations):
            others = ", ".join(layer.parametrizations.keys() - set(names))
            raise InvalidInput(f"{others} of a layer with factors is parametrized, too: remove that parametrization")
    for layer, names in products.items():
        order = layer.parametrizations[names[0]][0].order
        made = {}
        for name in names:
            a, b = factors_of(layer, name)
            made[name] = nn.Parameter((a * b).detach(), requires_grad=a.requires_grad)
        # Not by torch's remove_parametrizations: it takes the properties from a class that copies of the layer share.
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for name, parameter in made.items():
            layer.register_parameter(name, parameter)
        for name in [name for name in order if name in layer._parameters]:
            layer._parameters[name] = layer._parameters.pop(name)


def refuse_factorized(model: nn.Module, what: str) -> None:
    """Check that no weight of ``model`` is a product of factors.

    Raises:
        InvalidInput: when one is, saying that ``what`` needs plain weights.
    """
    if factorized(model):
        raise InvalidInput(
            f"weights of the model are products of two factors, and {what} needs plain ones: call multiply_out(model) "
            "of resode.train.sparsity first"
        )
