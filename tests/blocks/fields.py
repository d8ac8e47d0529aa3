"""Vector fields for the tests of solvers, and the states they act on."""

import torch
from torch import nn


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Function(nn.Module):
    """A field given by a function of (t, h), which notes the times it is asked at."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function, self.times = function, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        assert isinstance(t, float), "a fixed type: nothing to synchronize on a GPU"
        self.times.append(t)
        return self.function(t, h)


class Field(nn.Module):
    """A user's branch: nothing of ours in it."""

    def __init__(self, c=4):
        super().__init__()
        self.W = nn.Parameter(0.5 * randn(c, c, seed=1))

    def forward(self, t, h):
        return torch.tanh(h @ self.W) * (1.0 + t)


class Linear(nn.Module):
    """dh/dt = A h, whose flow is known."""

    def __init__(self, c=4):
        super().__init__()
        self.A = nn.Parameter(randn(c, c, seed=2))

    def forward(self, t, h):
        return h @ self.A.T

    def flow(self, h, t):
        return h @ torch.linalg.matrix_exp(t * self.A).T


class Clock(nn.Module):
    """dh/dt = 1: the flow tells how long it was."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        return torch.ones_like(h)
