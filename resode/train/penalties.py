"""What a training adds to the loss of its data, or to the optimizer's step."""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights, which decay, and the rest, which do not.

    The rest are parameters of fewer than two dimensions: biases, scales and shifts of norms, single numbers
    (SkipInit). Decaying a norm's scale acts on nothing but the step size of what stands before it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
