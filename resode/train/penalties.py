"""What a training adds to the loss of its data, or to the optimizer's step."""

from typing import Any

from torch import nn

from resode.blocks.varying import drawn_values
from resode.layers.norm import LayerNorm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights, which decay, and the rest, which do not.

    The rest are parameters of fewer than two dimensions (biases, scales and shifts of norms, single numbers such as
    SkipInit's), and the scale and shift of a layer norm of any. Of one that varies with t, the dimensions at one t
    count. Decaying a norm's scale acts on nothing but the step size of what stands before it.
    """
    of_norms = {p for layer in model.modules() if isinstance(layer, _NORMS) for p in layer.parameters()}
    stacked = drawn_values(model)

    def decays(p: nn.Parameter) -> bool:
        return p.ndim - (p in stacked) > 1 and p not in of_norms

    parameters = [p for p in model.parameters() if p.requires_grad]
    weights, rest = [p for p in parameters if decays(p)], [p for p in parameters if not decays(p)]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


_NORMS = (LayerNorm, nn.LayerNorm)
"""The norms whose scale and shift may have more dimensions than one."""
