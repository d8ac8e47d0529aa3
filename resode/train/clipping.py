"""Adaptive gradient clipping, for nets without norms (Brock et al. 2021, arXiv 2102.06171, section 4).

A step of gradient descent changes the weights W_i of a unit i by η‖G_i‖/‖W_i‖ relative to what they are. Where that
would be too much, the gradient of the unit is made smaller (eq. 3):

    G_i ← λ (max(‖W_i‖, ε)/‖G_i‖) G_i  if  ‖G_i‖ > λ max(‖W_i‖, ε),

with Frobenius norms. A unit is what makes one output: the i-th row of a linear map, all weights of the i-th filter of a
convolution. A vector (a bias, the gains, the parameters of a norm) and a single number are one unit each, as in the
authors' code. ε lets parameters that begin at 0 move. The last linear layer is left alone, as in the paper.
"""

import torch
from torch import Tensor, nn

from resode.blocks.varying import varying_layers
from resode.errors import positive

_TINY = 1e-30


@torch.no_grad()
def adaptive_clip_(model: nn.Module, clipping: float, *, eps: float = 1e-3) -> None:
    """Clip the gradients of ``model``, in place, unit by unit, to ``clipping`` times the norm of the unit's weights.

    Parameters that vary with t have units at each knot, which are clipped one by one. The last linear layer (the last
    ``nn.Linear`` among the modules) is left alone, and so is what has no gradient. Norms are taken in at least float32,
    on the device, which is not waited for.

    Args:
        clipping: λ; 0.01 … 0.16 in the paper, the smaller the larger the batch.
        eps: ε, least norm that a unit is taken to have.

    Raises:
        InvalidInput: for ``clipping`` or ``eps`` that is no finite number above 0.
    """
    positive(clipping, "clipping")
    positive(eps, "eps")
    last = next((layer for layer in reversed(list(model.modules())) if isinstance(layer, nn.Linear)), None)
    spared = set() if last is None else set(last.parameters())
    stacked = {parameter for layers in varying_layers(model) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if parameter.grad is None or parameter in spared:
            continue
        weight_norm = unit_norms(parameter, parameter in stacked).clamp(min=eps)
        gradient_norm = unit_norms(parameter.grad, parameter in stacked)
        share = (clipping * weight_norm / gradient_norm.clamp(min=_TINY)).clamp(max=1.0)
        parameter.grad.mul_(share)  # in the type of ``share``: a small one has no digits in half precision


def unit_norms(values: Tensor, stacked: bool = False) -> Tensor:
    """The Frobenius norms of the units of ``values``, in a shape that spreads over it.

    Args:
        values: (out, …), or (C,), or of no dimension; with the knots as one more dimension before these if ``stacked``.
    """
    knots = int(stacked)
    # A matrix of one row or column, such as the weights of a time channel, is a vector too.
    vector = sum(side > 1 for side in values.shape[knots:]) <= 1
    over = tuple(range(knots if vector else knots + 1, values.ndim))
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not over:  # a number, or one a knot
        return values.to(dtype).abs()
    return torch.linalg.vector_norm(values, dim=over, keepdim=True, dtype=dtype)
