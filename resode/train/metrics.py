"""What is measured of a net: loss, accuracy, evaluations of its branches."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.blocks.ode import ode_blocks, solver_settings
from resode.blocks.residual import ResidualBlock
from resode.errors import InvalidInput
from resode.nets.net import evaluating


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy and share of right answers on ``count`` samples; ``nfe`` of one forward pass."""

    loss: float
    accuracy: float
    count: int
    nfe: int

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], *, mirrored: bool = False) -> Metrics:
    """Loss and accuracy of ``model`` in evaluation mode on pairs (x, labels).

    With ``mirrored`` the logits are the mean of those of the images (B, C, H, W) and of their mirror images, left to
    right (test-time flipping: Krizhevsky et al. 2012, section 4.1; Jordan 2024, arXiv 2404.00498).

    ODE blocks run uncompiled: the last batch of a split has a shape of its own, and a graph costs more than it saves.

    Raises:
        InvalidInput: when there is no data.
    """
    loss = right = 0.0
    count = 0
    with evaluating(model), solver_settings(model, compile_mode=None):
        for x, labels in data:
            logits = model(x) if not mirrored else 0.5 * (model(x) + model(x.flip(-1)))
            # Summed in double precision on the device: one transfer at the end, and no rounding over many batches.
            loss = loss + F.cross_entropy(logits.double(), labels, reduction="sum")
            right = right + (logits.argmax(1) == labels).sum()
            count += len(labels)
    if count == 0:
        raise InvalidInput("nothing to evaluate on: the split is empty")
    return Metrics(float(loss) / count, float(right) / count, count, nfe(model))


def nfe(model: nn.Module) -> int:
    """Evaluations of branches in the last forward pass: one a residual block, and those of each ODE block's solve."""
    solves = sum(block.stats.nfe_forward for block in ode_blocks(model).values())
    return solves + sum(isinstance(block, ResidualBlock) for block in model.modules())


def first_nonfinite(values: Tensor) -> int | None:
    """Index of the first value that is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(values))
    return int(bad[0]) if len(bad) else None
