"""Nets of plain layers and poolings: LeNet-5, AlexNet, VGG."""

from typing import Any

from torch import nn

from resode.nets.config import NetConfig, each
from resode.nets.net import Net, PlainLayer, without_identities
from resode.stack import Stack


def plain_layer(
    stack: Stack, c: int, o: int, size: tuple[int, int] | None, depth: float, kernel: int = 3, **options: Any
) -> PlainLayer:
    """Convolution (linear, for points: no ``size``) – norm – activation – dropout, from ``c`` to ``o`` channels.

    Args:
        size: (H, W) of the output.
        depth: relative depth in the net, for dropout with a linear schedule.
        options: stride and padding of the convolution, and whether its input is ``activated``.
    """
    first = (
        stack.linear_layer(c, o, depth=depth, bias=stack.norm == "none")
        if size is None
        else stack.conv_layer(c, o, kernel, depth=depth, **options)
    )
    return PlainLayer(first, stack.norm_layer(o, size), stack.activation_layer(), stack.dropout_layer(depth))


def pooled_head(config: NetConfig, channels: int, *before: nn.Module) -> nn.Sequential:
    """``before``, global average pooling, and one linear layer to the classes."""
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config.classes))


def linear_head(config: NetConfig, features: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Hidden linear layers of ``widths`` with activation and dropout, and the linear layer to the classes."""
    stack, layers = config.stack, [nn.Flatten()]
    for width in widths:
        layers += [stack.linear_layer(features, width), stack.activation_layer(), stack.dropout_layer()]
        features = width
    return nn.Sequential(*without_identities(layers), nn.Linear(features, config.classes))


def build_lenet5(config: NetConfig) -> Net:
    """LeCun et al. 1998, with average pooling; images of up to 28×28 are padded by 2, as the original's were."""
    stack, (H, W) = config.stack, config.size
    padding = 2 if min(H, W) <= 28 else 0
    H, W, c, stages = H + 2 * padding, W + 2 * padding, config.channels, []
    for o in (6, 16):
        H, W = H - 4, W - 4
        layer = plain_layer(stack, c, o, (H, W), o / 16, kernel=5, padding=padding, activated=bool(stages))
        stages.append(nn.Sequential(layer, nn.AvgPool2d(2)))
        H, W, c, padding = H // 2, W // 2, o, 0
    return Net(stack.input_layer(), stages, linear_head(config, c * H * W, (120, 84)))


def build_alexnet(config: NetConfig) -> Net:
    """Krizhevsky et al. 2012 for 32×32 images: its five convolutions with 3×3 kernels, 2×2 poolings, 1024 units."""
    return _pooled_stages(config, ((64,), (192,), (384, 256, 256)), (1024, 1024))


def build_vgg(config: NetConfig) -> Net:
    """Simonyan & Zisserman 2015: ``blocks`` of ``convs`` 3×3 convolutions of 64, 128, 256, 512, 512 … channels."""
    convs = each(config.convs) * (config.blocks if len(each(config.convs)) == 1 else 1)
    return _pooled_stages(config, tuple((64 * 2 ** min(i, 3),) * n for i, n in enumerate(convs)), None)


def _pooled_stages(config: NetConfig, widths: tuple[tuple[int, ...], ...], hidden: tuple[int, ...] | None) -> Net:
    """A stage of 3×3 convolutions for each of ``widths``, each ending in a 2×2 pooling.

    Args:
        hidden: widths of the hidden linear layers; None for global average pooling and one linear layer.
    """
    (H, W), c, made, total = config.size, config.channels, 0, sum(map(len, widths))
    stages = []
    for stage in widths:
        layers: list[nn.Module] = []
        for o in stage:
            made += 1
            layers.append(plain_layer(config.stack, c, o, (H, W), made / total, activated=made > 1))
            c = o
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        H, W = H // 2, W // 2
    head = pooled_head(config, c) if hidden is None else linear_head(config, c * H * W, hidden)
    return Net(config.stack.input_layer(), stages, head)
