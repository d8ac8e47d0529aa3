"""Reading timm's networks, without importing timm.

================== ==============================================================================================
class              steps
================== ==============================================================================================
ResNet             a block each: resnet*, resnext*, wide_resnet*, seresnet*, ecaresnet*, res2net*, resnest*,
                   skresnet* and their kin
ResNetV2           a pre-activation block each (He et al. 2016, arXiv 1603.05027): resnetv2_*
ConvNeXt           a block each, and a transition before each stage but the first: convnext_*, convnextv2_*
VisionTransformer  two to a block, attention and perceptron: vit_*, deit*, flexivit_*
================== ==============================================================================================

Drop path, drop block, layer scale and the attention of squeeze-and-excitation and its kin belong to the branches. A
ViT whose blocks compute attention and perceptron side by side, or that is of another class (Eva, Beit, Cait, …), is
refused by name.
"""

from collections.abc import Callable, Iterator
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
    read_blocks,
    resnet_blocks,
    transition,
)
from resode.dynamics.parts import Parts, Reader
from resode.dynamics.step import Map, Step, identity


def reader(model: nn.Module) -> Reader | None:
    """What reads ``model``, if it is one of timm's networks that can be read.

    Raises:
        InvalidInput: for a class that inherits from one of those and has a forward of its own.
    """
    return known_class(model, _READERS, ("forward_features",))


# ResNet


def _basic(block: Any, h: Tensor) -> Tensor:
    h = chain(h, block.conv1, block.bn1, block.drop_block, block.act1, block.aa)
    return chain(h, block.conv2, block.bn2, block.se, block.drop_path)


def _bottleneck(block: Any, h: Tensor) -> Tensor:
    h = chain(h, block.conv1, block.bn1, block.act1)
    h = chain(h, block.conv2, block.bn2, block.drop_block, block.act2, block.aa)
    return chain(h, block.conv3, block.bn3, block.se, block.drop_path)


def _multiscale(block: Any, h: Tensor) -> Tensor:
    """Res2Net (Gao et al. 2019, arXiv 1904.01169): each group of channels is added to the next before its convolution,
    but for the first block of a stage."""
    groups = torch.split(chain(h, block.conv1, block.bn1, block.relu), block.width, 1)
    made: list[Tensor] = []
    for i, (conv, norm) in enumerate(zip(block.convs, block.bns, strict=True)):
        group = groups[i] if i == 0 or block.is_first else made[-1] + groups[i]
        made.append(chain(group, conv, norm, block.relu))
    if block.scale > 1:
        made.append(chain(groups[-1], block.pool))
    # Older versions drop nothing here.
    dropped = [getattr(block, name, None) for name in ("drop_block", "drop_path")]
    return chain(torch.cat(made, 1), dropped[0], block.conv3, block.bn3, block.se, dropped[1])


def _split_attention(block: Any, h: Tensor) -> Tensor:
    """ResNeSt (Zhang et al. 2020, arXiv 2004.08955)."""
    h = chain(h, block.conv1, block.bn1, block.act1, block.avd_first)
    h = chain(h, block.conv2, block.bn2, block.drop_block, block.act2, block.avd_last)
    return chain(h, block.conv3, block.bn3)


def _dropped_downsampling(block: Any) -> Map:
    """ResNeSt's shortcut in timm, which drops the path here; without a downsampling it drops nothing."""
    if block.downsample is None:
        return identity
    return lambda h: chain(h, block.drop_path, block.downsample)


def _selective_basic(block: Any, h: Tensor) -> Tensor:
    """SKNet (Li et al. 2019, arXiv 1903.06586)."""
    return chain(h, block.conv1, block.conv2, block.se, block.drop_path)


def _selective_bottleneck(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.conv1, block.conv2, block.conv3, block.se, block.drop_path)


_RESNET = {
    "timm.models.resnet.BasicBlock": (Addition(_basic, downsampling, "act2"),),
    "timm.models.resnet.Bottleneck": (Addition(_bottleneck, downsampling, "act3"),),
    "timm.models.res2net.Bottle2neck": (Addition(_multiscale, downsampling, "relu"),),
    "timm.models.resnest.ResNestBottleneck": (Addition(_split_attention, _dropped_downsampling, "act3"),),
    "timm.models.sknet.SelectiveKernelBasic": (Addition(_selective_basic, downsampling, "act"),),
    "timm.models.sknet.SelectiveKernelBottleneck": (Addition(_selective_bottleneck, downsampling, "act"),),
}


def _read_resnet(model: Any) -> Parts:
    return Parts(
        stem=lambda x: chain(x, model.conv1, model.bn1, model.act1, model.maxpool),
        steps=read_blocks(model, resnet_blocks(model), _RESNET),
        head=model.forward_head,
        shape=image_shape(model),
    )


# ResNetV2


def _preact_basic(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.norm1, block.conv1, block.norm2, block.conv2, block.drop_path)


def _preact_bottleneck(block: Any, h: Tensor) -> Tensor:
    h = chain(h, block.norm1, block.conv1, block.norm2, block.conv2)
    return chain(h, block.norm3, block.conv3, block.drop_path)


def _preact_downsampling(block: Any) -> Map:
    """The shortcut that changes the shape begins with the same norm and activation as the branch."""
    return identity if block.downsample is None else lambda h: block.downsample(block.norm1(h))


def _postact_bottleneck(block: Any, h: Tensor) -> Tensor:
    h = chain(h, block.conv1, block.norm1, block.conv2, block.norm2)
    return chain(h, block.conv3, block.norm3, block.drop_path)


_RESNET_V2 = {
    "timm.models.resnetv2.PreActBasic": (Addition(_preact_basic, _preact_downsampling),),
    "timm.models.resnetv2.PreActBottleneck": (Addition(_preact_bottleneck, _preact_downsampling),),
    "timm.models.resnetv2.Bottleneck": (Addition(_postact_bottleneck, downsampling, "act3"),),
}


def _read_resnet_v2(model: Any) -> Parts:
    blocks = (block for i, stage in enumerate(model.stages) for block in numbered(f"stages.{i}", i, stage.blocks))
    return Parts(
        stem=model.stem,
        steps=read_blocks(model, blocks, _RESNET_V2),
        head=lambda h: model.forward_head(model.norm(h)),
        shape=image_shape(model),
    )


# ConvNeXt


def _convnext(block: Any, h: Tensor) -> Tensor:
    h = block.conv_dw(h)
    if block.use_conv_mlp:
        h = chain(h, block.norm, block.mlp)
    else:
        h = chain(h.permute(0, 2, 3, 1), block.norm, block.mlp).permute(0, 3, 1, 2)
    if block.gamma is not None:
        h = h * block.gamma.reshape(1, -1, 1, 1)
    return block.drop_path(h)


def _convnext_shortcut(block: Any) -> Map:
    return identity if isinstance(block.shortcut, nn.Identity) else block.shortcut


_CONVNEXT = {"timm.models.convnext.ConvNeXtBlock": (Addition(_convnext, _convnext_shortcut),)}


def _read_convnext(model: Any) -> Parts:
    return Parts(
        stem=model.stem,
        steps=read_blocks(model, _convnext_stages(model), _CONVNEXT),
        head=lambda h: model.forward_head(model.norm_pre(h)),
        shape=image_shape(model),
    )


def _convnext_stages(model: Any) -> Iterator[Block | Step]:
    for i, stage in enumerate(model.stages):
        if not isinstance(stage.downsample, nn.Identity):
            yield transition(f"stages.{i} downsampling", i, stage.downsample)
        yield from numbered(f"stages.{i}", i, stage.blocks)


# ViT


def _attention(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.norm1, block.attn, block.ls1, block.drop_path1)


def _perceptron(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.norm2, block.mlp, block.ls2, block.drop_path2)


def _normed_attention(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.attn, block.norm1, block.drop_path1)


def _normed_perceptron(block: Any, h: Tensor) -> Tensor:
    return chain(h, block.mlp, block.norm2, block.drop_path2)


def _sum_of(name: str) -> Callable[[Any, Tensor], Tensor]:
    """The sum of what each of the modules ``name`` of a block gives."""
    return lambda block, h: torch.stack([module(h) for module in getattr(block, name)]).sum(dim=0)


def _vit(
    attention: Callable[[Any, Tensor], Tensor], perceptron: Callable[[Any, Tensor], Tensor]
) -> tuple[Addition, ...]:
    return Addition(attention, word="attention"), Addition(perceptron, word="perceptron")


_VIT = {
    "timm.models.vision_transformer.Block": _vit(_attention, _perceptron),
    "timm.models.vision_transformer.ResPostBlock": _vit(_normed_attention, _normed_perceptron),
    "timm.models.vision_transformer.ParallelThingsBlock": _vit(_sum_of("attns"), _sum_of("ffns")),
}


def _read_vit(model: Any) -> Parts:
    blocks = (Block(f"encoder {i}", 0, block) for i, block in enumerate(model.blocks))
    size = model.patch_embed.img_size
    return Parts(
        stem=lambda x: chain(x, model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre),
        steps=read_blocks(model, blocks, _VIT),
        head=lambda h: model.forward_head(model.norm(h)),
        shape=None if size is None else image_shape(model, *size),
    )


_READERS = {
    "timm.models.resnet.ResNet": _read_resnet,
    "timm.models.resnetv2.ResNetV2": _read_resnet_v2,
    "timm.models.convnext.ConvNeXt": _read_convnext,
    "timm.models.vision_transformer.VisionTransformer": _read_vit,
}
