"""Nets whose dynamics are linear, f(t, h) = a(t) A h with a(t) = 1 + 3t², and what they do as products of matrices."""

from itertools import pairwise

import torch
from torch import nn

from resode import ODEBlock

D = 4


class Field(nn.Module):
    """f(t, h) = (1 + 3t²) A h for rows h, whose flow from 0 to t is exp((t + t³) A)."""

    def __init__(self, A):
        super().__init__()
        self.register_buffer("A", A)

    def forward(self, t, h):
        return rate(t) * h @ self.A.T


def rate(t):
    return 1 + 3 * t * t


def matrix(seed=0, size=0.4):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(D, D, dtype=torch.float64, generator=generator)


def net_of(solver="euler", steps=8, A=None, **settings):
    """The block, and a linear head."""
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(D, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return nn.Sequential(ODEBlock(Field(matrix() if A is None else A), solver, steps, **settings), head)


def data(sizes=(5, 2)):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, D, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def inputs():
    return torch.cat([x for x, _ in data()])


def labels():
    return torch.cat([y for _, y in data()])


def points(steps):
    return [i / steps for i in range(steps + 1)]


def euler_step(A, start, end):
    """The matrix of a step of Euler's method (backwards if end < start)."""
    return torch.eye(D, dtype=A.dtype) + (end - start) * rate(start) * A


def rk4_step(A, start, end):
    """The matrix of a step of the classical method of order 4."""
    one, step, middle = torch.eye(D, dtype=A.dtype), end - start, (start + end) / 2
    k1 = rate(start) * A
    k2 = rate(middle) * A @ (one + step / 2 * k1)
    k3 = rate(middle) * A @ (one + step / 2 * k2)
    k4 = rate(end) * A @ (one + step * k3)
    return one + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


STEP = {"euler": euler_step, "rk4": rk4_step}


def product(A, times, solver="euler"):
    """The matrix of the steps from point to point of ``times``."""
    whole = torch.eye(D, dtype=A.dtype)
    for start, end in pairwise(times):
        whole = STEP[solver](A, start, end) @ whole
    return whole


def flow(A, t=1.0):
    """The matrix of the flow from 0 to ``t``."""
    return torch.linalg.matrix_exp((t + t**3) * A)
