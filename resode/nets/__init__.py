"""Whole networks: a stem, stages of steps, a head.

Every net is a :class:`Net`: ``head(stages(stem(x)))``. A stage is a sequence of residual blocks, plain layers, ODE
blocks or poolings; what differs between a residual net and an ODE net is what stands in the stages, and nothing else.

======== =================================================== ===================================================
net      stages                                              source
======== =================================================== ===================================================
lenet5   2 × (conv5 – pool), 3 linear layers                 LeCun et al. 1998
alexnet  5 convolutions, 3 poolings, 3 linear layers         Krizhevsky et al. 2012, in the form for 32×32 images
vgg      ``blocks`` × (``convs`` × conv3 – pool), then       Simonyan & Zisserman 2015, 1409.1556, with global
         average pooling and one linear layer                average pooling
plain    the residual net of this depth, without shortcuts   He et al. 2016, 1512.03385, section 4.2
resnet   3 stages of n = (depth − 2)/6 residual blocks       the same; kind "preact": He et al. 2016, 1603.05027
odenet   3 stages: the same transitions, and an ODE block    Chen et al. 2018, 1806.07366
         in the place of the other residual blocks
======== =================================================== ===================================================

On points (no image size) ``resnet``, ``plain`` and ``odenet`` have one stage, whose state is the point itself.
"""

from typing import Any

import torch
from torch import nn

from resode.blocks.varying import drawn_values
from resode.nets.classic import build_alexnet, build_lenet5, build_vgg
from resode.nets.config import NETS, Architecture, NetConfig
from resode.nets.net import Net, PlainLayer, parameter_count
from resode.nets.staged import build_staged
from resode.seeding import seeded
from resode.stack import Stack

__all__ = [
    "NETS",
    "Architecture",
    "Net",
    "NetConfig",
    "PlainLayer",
    "alexnet",
    "build",
    "lenet5",
    "odenet",
    "parameter_count",
    "plain",
    "resnet",
    "vgg",
]

_BUILDERS = {"lenet5": build_lenet5, "alexnet": build_alexnet, "vgg": build_vgg}


def build(config: NetConfig, seed: int | None = None) -> Net:
    """The net that ``config`` describes, with He-normal convolutions (He et al. 2015, arXiv 1502.01852, fan-out).

    Weights that vary with t are drawn so at every piece or knot; on the Fourier basis they are constant at first.

    Args:
        seed: draw the parameters from this seed, and leave the global random state as it is.
    """
    if seed is not None:
        # The parameters are drawn on the CPU: the other devices' random states need no care.
        with seeded(seed):
            return build(config)
    net = _BUILDERS.get(config.net, build_staged)(config)
    net.input_shape = (config.channels, *(config.size or ()))
    stacked = drawn_values(net)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            for weight in stacked.get(layer.weight, [layer.weight]):
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
                with torch.no_grad():  # torch counts the fan of a grouped convolution as if it were not grouped
                    weight.mul_(layer.groups**0.5)
    return net


def _one(net: str, stack: Stack | None, **settings: Any) -> Net:
    return build(NetConfig(net=net, stack=Stack() if stack is None else stack, **settings))


def lenet5(stack: Stack | None = None, **settings: Any) -> Net:
    """LeNet-5; ``settings`` are those of :class:`NetConfig` (channels, size, classes, …).

    With ``Stack(norm="none")`` on 32×32×1 it has LeNet-5's 61,706 parameters.
    """
    return _one("lenet5", stack, **settings)


def alexnet(stack: Stack | None = None, **settings: Any) -> Net:
    """AlexNet in the form for 32×32 images."""
    return _one("alexnet", stack, **settings)


def vgg(blocks: int, convs: int | tuple[int, ...], stack: Stack | None = None, **settings: Any) -> Net:
    """VGG(b, c): ``blocks`` blocks of ``convs`` convolutions; (5, (1, 1, 2, 2, 2)) are VGG-11's."""
    return _one("vgg", stack, blocks=blocks, convs=convs, **settings)


def plain(depth: int, stack: Stack | None = None, **settings: Any) -> Net:
    """The plain net of ``depth`` = 6n + 2 layers."""
    return _one("plain", stack, depth=depth, **settings)


def resnet(depth: int, stack: Stack | None = None, **settings: Any) -> Net:
    """The residual net of ``depth`` = 6n + 2 layers; ``kind="preact"`` for the pre-activation form."""
    return _one("resnet", stack, depth=depth, **settings)


def odenet(stack: Stack | None = None, **settings: Any) -> Net:
    """The ODE net: stem and transitions of the residual net, and an ODE block in each stage.

    A flow ends without an activation, so its head begins with a norm and an activation, as the pre-activation
    residual net's does.
    """
    return _one("odenet", stack, **settings)
