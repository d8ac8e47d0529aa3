"""Nets that look trained, for the tests of lifting, discretizing and refining."""

import torch
from torch import nn

from resode import NetConfig, ODEBlock, ResidualBlock, build
from resode.layers import BatchNorm
from resode.nets.sequences import keeps_shape


def seasoned(net, seed=0):
    """``net`` in double precision and evaluation mode, with drawn statistics, affine maps, biases and scales."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, dtype=torch.float64, generator=generator))

    net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2:
                draw(p, 0.4, 1.2)
        for layer in net.modules():
            if isinstance(layer, BatchNorm):
                draw(layer.running_mean, -0.5, 0.5)
                draw(layer.running_var, 0.5, 2.0)
                layer.num_batches_tracked.random_(1, 99, generator=generator)
            if keeps_shape(layer) and isinstance(layer.scale, nn.Parameter):
                draw(layer.scale, -0.5, 0.5)
    return net


def net_of(net="resnet", seed=0, **settings):
    """One of our nets on images of 6 × 6 pixels; resnet-20 has runs of 3, 2 and 2 blocks."""
    shape = {"width": 4, "size": (6, 6), "classes": 3}
    deep = {"depth": 20} if net == "resnet" else {}
    return seasoned(build(NetConfig(net=net, **{"kind": "preact", **shape, **deep, **settings}), seed), seed)


def images(count=3, seed=7, size=6):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points(count=5, channels=4, seed=7):
    return torch.randn(count, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(found, expected):
    """The largest difference, relative to the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def flows(net):
    return [module for module in net.modules() if isinstance(module, ODEBlock)]


def blocks(net):
    """The residual blocks that keep the shape."""
    return [module for module in net.modules() if keeps_shape(module)]


def kinds(net):
    """The classes of the modules that stand in the stages of ``net``."""
    return [[type(module) for module in stage] for stage in net.stages]


def run_of(branches, t=lambda i, count: i / count, **settings):
    """A sequence of residual blocks with these branches."""
    count = len(branches)
    return nn.Sequential(*(ResidualBlock(b, t=t(i, count), depth=count, **settings) for i, b in enumerate(branches)))


class Wave(nn.Module):
    """f(t, h) = sin(h Wᵀ + t v) for h of shape (B, C): smooth, and a branch that is none of ours."""

    def __init__(self, channels=4, seed=0, moving=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.7 * torch.randn(channels, channels, dtype=torch.float64, generator=generator))
        self.along = nn.Parameter(torch.randn(channels, dtype=torch.float64, generator=generator) * float(moving))

    def forward(self, t, h):
        return torch.sin(h @ self.weight.T + t * self.along)
