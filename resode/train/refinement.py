"""Multi-level training: train a shallow net, refine it at given epochs, and train on."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from resode.errors import InvalidInput
from resode.nets.refine import check_factor, refine_


@dataclass(frozen=True)
class Refine:
    """A callback of ``fit`` that refines the net after given numbers of epochs (``--refine`` of ContinuousNet: Queiruga
    et al. 2020, arXiv 2008.02389).

    Args:
        after: numbers of epochs, increasing.
        factor: how many times more steps each refinement gives (see :func:`resode.limits.refine`).

    Raises:
        InvalidInput: for numbers that are not whole, below 1, or do not increase, or a factor below 2.
    """

    after: tuple[int, ...]
    factor: int = 2

    def __post_init__(self) -> None:
        check_epochs(self.after)
        check_factor(self.factor)

    def __call__(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> bool:
        """Refine ``model`` and ``optimizer`` if it is time, before ``epoch`` (from 0); whether it was."""
        if epoch not in self.after:
            return False
        refine_(model, self.factor, optimizer)
        return True

    def replay(self, model: nn.Module, epochs: int) -> None:
        """Give a net that was just built the structure that it had at the end of so many ``epochs``."""
        for after in self.after:
            if after < epochs:
                refine_(model, self.factor)


def check_epochs(after: tuple[int, ...]) -> None:
    """Check the numbers of epochs after which to refine.

    Raises:
        InvalidInput: when they are no whole numbers of at least 1, or do not increase.
    """
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in after)
    if not whole or list(after) != sorted(set(after)):
        raise InvalidInput(f"refine after epochs {after}: whole numbers of at least 1, increasing, are expected")
