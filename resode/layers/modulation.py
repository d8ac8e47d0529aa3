"""Layers that scale: FiLM (by time) and LayerScale (by a learned factor a channel)."""

import math

import torch
from torch import Tensor, nn


def fourier_features(t: float | Tensor, frequencies: Tensor) -> Tensor:
    """(t, sin πkt, cos πkt for the frequencies k): the embedding of a time in [0, 1], of shape (1 + 2n,)."""
    angles = math.pi * frequencies * t
    return torch.cat([(torch.ones_like(frequencies[:1]) * t), torch.sin(angles), torch.cos(angles)])


class FiLM(nn.Module):
    """Feature-wise linear modulation by time: h ↦ (1 + γ(t))·h + β(t), one γ and β a channel.

    (γ, β)(t) = W φ(t) + b with φ the Fourier features of t, initialized small, so that the layer starts near the
    identity. Perez et al. 2018, arXiv 1709.07871, with time as the condition.
    """

    def __init__(self, channels: int, features: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1.0, features + 1.0), persistent=False)
        self.weight = nn.Parameter(0.01 * torch.randn(2 * channels, 1 + 2 * features))
        self.bias = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, h: Tensor, t: float | Tensor) -> Tensor:
        gamma, beta = (self.weight @ fourier_features(t, self.frequencies) + self.bias).chunk(2)
        shape = (-1, *(1 for _ in h.shape[2:]))
        return torch.addcmul(h + beta.view(shape), h, gamma.view(shape))


class LayerScale(nn.Module):
    """h ↦ γ·h, one learned γ a channel, initialized at a small value. Touvron et al. 2021, arXiv 2103.17239."""

    def __init__(self, channels: int, init: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), init))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight.view(-1, *(1 for _ in h.shape[2:]))
