"""Gaussian noise on a state, in training.

For a linear model W and the squared error the noise is weight decay: with ε ~ N(0, σ² I),

    E ‖W(x + ε) − y‖² = ‖W x − y‖² + σ² ‖W‖²,

Tikhonov's regularization, and in general so to order σ² (Bishop 1995, Neural Computation 7, 108).
"""

import math

import torch
from torch import Tensor, nn

from resode.errors import InvalidInput
from resode.layers.context import current


def deviation(sigma: float) -> float:
    """Return ``sigma`` if it can be the standard deviation of noise.

    Raises:
        InvalidInput: when it is negative or not finite.
    """
    if not 0.0 <= sigma < math.inf:
        raise InvalidInput(f"standard deviation of noise is {sigma!r}: a finite number of at least 0 is expected")
    return sigma


class GaussianNoise(nn.Module):
    """x + σ·ε in training, with ε ~ N(0, 1) for each element; x itself in evaluation.

    ε is drawn at each call; inside a solve once (or once a mask interval), as the masks of dropout are.

    Raises:
        InvalidInput: for ``sigma`` that is negative or not finite.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = deviation(sigma)

    def forward(self, x: Tensor) -> Tensor:
        context = current()
        training = self.training if context is None else context.is_training(self)
        if self.sigma == 0.0 or not training:
            return x
        noise = torch.randn_like(x) if context is None else context.mask(self, torch.randn_like, x)
        return torch.add(x, noise, alpha=self.sigma)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"
