"""Reading torchvision's networks.

================== ==============================================================================================
class              steps
================== ==============================================================================================
ResNet             a block each: resnet*, resnext*, wide_resnet* (He et al. 2015, arXiv 1512.03385)
ConvNeXt           a block each, and a transition before each stage but the first (Liu et al. 2022, 2201.03545)
VisionTransformer  two to a block, attention and perceptron (Dosovitskiy et al. 2020, 2010.11929)
VGG                plain ones, convolution [– norm] – ReLU; the poolings are transitions (Simonyan & Zisserman 2015)
================== ==============================================================================================

Stochastic depth, layer scale and dropout belong to the branches.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resode.dynamics.additions import (
    Addition,
    Block,
    chain,
    downsampling,
    image_shape,
    known_class,
    numbered,
    plain,
    read_blocks,
    require_known,
    resnet_blocks,
    transition,
)
from resode.dynamics.parts import Parts, Reader, children_of, unreadable
from resode.dynamics.step import Step, identity

_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)


def reader(model: nn.Module) -> Reader | None:
    """What reads ``model``, if it is one of torchvision's networks that can be read.

    Raises:
        InvalidInput: for a class that inherits from one of those and has a forward of its own.
    """
    return known_class(model, _READERS, ("_forward_impl", "_process_input"))


# ResNet


def _basic(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.conv1, block.bn1, block.relu, block.conv2, block.bn2)


def _bottleneck(block: Any, h: Tensor) -> Tensor:
    h = chain(h, block.conv1, block.bn1, block.relu, block.conv2, block.bn2, block.relu)
    return chain(h, block.conv3, block.bn3)


_RESNET = {
    "torchvision.models.resnet.BasicBlock": (Addition(_basic, downsampling, "relu"),),
    "torchvision.models.resnet.Bottleneck": (Addition(_bottleneck, downsampling, "relu"),),
}


def _read_resnet(model: Any) -> Parts:
    return Parts(
        stem=lambda x: chain(x, model.conv1, model.bn1, model.relu, model.maxpool),
        steps=read_blocks(model, resnet_blocks(model), _RESNET),
        head=lambda h: model.fc(torch.flatten(model.avgpool(h), 1)),
        shape=image_shape(model),
    )


# ConvNeXt


def _convnext(block: Any, h: Tensor) -> Tensor:
    return block.stochastic_depth(block.layer_scale * block.block(h))


_CONVNEXT = {"torchvision.models.convnext.CNBlock": (Addition(_convnext),)}


def _read_convnext(model: Any) -> Parts:
    return Parts(
        stem=model.features[0],
        steps=read_blocks(model, _convnext_stages(model), _CONVNEXT),
        head=lambda h: model.classifier(model.avgpool(h)),
        shape=image_shape(model),
    )


def _convnext_stages(model: Any) -> Iterator[Block | Step]:
    stage = 0
    for part in model.features[1:]:
        if isinstance(part[-1], nn.Conv2d):
            stage += 1
            yield transition(f"stages.{stage} downsampling", stage, part)
        else:
            yield from numbered(f"stages.{stage}", stage, part)


# ViT


def _attention(block: Any, h: Tensor) -> Tensor:
    x = block.ln_1(h)
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def _perceptron(block: Any, h: Tensor) -> Tensor:
    return block.mlp(block.ln_2(h))


_ENCODER = "torchvision.models.vision_transformer.Encoder"
_VIT = {
    "torchvision.models.vision_transformer.EncoderBlock": (
        Addition(_attention, word="attention"),
        Addition(_perceptron, word="perceptron"),
    )
}


def _read_vit(model: Any) -> Parts:
    require_known(model, [("encoder", model.encoder)], [_ENCODER])

    def stem(x: Tensor) -> Tensor:
        x = model._process_input(x)
        tokens = torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1)
        return model.encoder.dropout(tokens + model.encoder.pos_embedding)

    blocks = (Block(f"encoder {i}", 0, block) for i, block in enumerate(model.encoder.layers))
    return Parts(
        stem=stem,
        steps=read_blocks(model, blocks, _VIT),
        head=lambda h: model.heads(model.encoder.ln(h)[:, 0]),
        shape=image_shape(model, model.image_size, model.image_size),
    )


# VGG


def _read_vgg(model: Any) -> Parts:
    layers = model.features
    # A step begins at each convolution, and a transition at each pooling; what follows belongs to it.
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
    if type(layers) is not nn.Sequential or not starts:
        raise unreadable(model, f"its features are no sequence with convolutions, but {children_of(layers)}")
    return Parts(
        stem=layers[: starts[0]] if starts[0] else identity,
        steps=list(_vgg_steps([layers[a:b] for a, b in pairwise([*starts, len(layers)])])),
        head=lambda h: model.classifier(torch.flatten(model.avgpool(h), 1)),
        shape=image_shape(model),
    )


def _vgg_steps(groups: list[nn.Sequential]) -> Iterator[Step]:
    stage = position = 0
    for group in groups:
        if isinstance(group[0], _POOLINGS):
            yield transition(f"pool{stage + 1}", stage, group)
            stage, position = stage + 1, 0
        else:
            position += 1
            yield plain(f"conv{stage + 1}_{position}", stage, group)


_READERS = {
    "torchvision.models.resnet.ResNet": _read_resnet,
    "torchvision.models.convnext.ConvNeXt": _read_convnext,
    "torchvision.models.vision_transformer.VisionTransformer": _read_vit,
    "torchvision.models.vgg.VGG": _read_vgg,
}
