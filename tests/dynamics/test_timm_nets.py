"""timm's networks seen as steps."""

from functools import cache, partial

import pytest
import torch
from foreign_nets import assert_near, check_deletions, check_gradient, check_training, check_view, distance, shaken
from torch import nn

from resode import InvalidInput, dynamics
from resode.dynamics import timm as timms

timm = pytest.importorskip("timm", reason="timm is no dependency")


def named(name, **settings):
    return partial(timm.create_model, name, num_classes=5, **settings)


def resnet(name, layers=(2, 1, 1, 2), **settings):
    """A narrow one of the named kind."""
    return named(name, layers=layers, channels=(8, 8, 16, 16), **settings)


def resnetv2(**settings):
    """As resnetv2_50x1_bit, with group norm and standardized weights."""
    settings = {"layers": (2, 1, 1, 1), "channels": (32, 32, 64, 64), "bottle_ratio": 1.0, **settings}
    return partial(timm.models.resnetv2.ResNetV2, num_classes=5, **{"stem_chs": 32, **settings})


def group_norm(channels, **settings):
    return nn.GroupNorm(4, channels, **settings)


def vit(name="vit_tiny_patch16_224", **settings):
    return named(name, **{"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, **settings})


def block_fn(name):
    return getattr(timm.models.vision_transformer, name)


NETS = {
    "resnet18": resnet("resnet18"),
    "resnet26d": resnet("resnet26d"),
    "resnet26t with another activation": resnet("resnet26t", act_layer=partial(nn.SiLU)),
    "resnetblur18": resnet("resnetblur18"),
    "resnetaa50d": resnet("resnetaa50d"),
    "resnet50 with group norm": resnet("resnet50", norm_layer=group_norm),
    "resnet34, dilated": resnet("resnet34", output_stride=8),
    "resnext26": resnet("seresnext26d_32x4d", (1, 1, 1, 1), cardinality=4, base_width=32),
    "seresnet18": resnet("seresnet18"),
    "ecaresnet26t": resnet("ecaresnet26t"),
    "senet154": resnet("senet154", (1, 1, 1, 1), cardinality=4, base_width=32),
    "resnetrs50": resnet("resnetrs50"),
    "res2net": resnet("res2net50_26w_4s"),
    "res2net of one scale": resnet("res2net50_26w_4s", block_args={"scale": 1}),
    "resnest14d": resnet("resnest14d", (1, 2, 1, 1)),
    "resnest of radix 0, pooled first": resnet(
        "resnest50d", (1, 2, 1, 1), block_args={"radix": 0, "avd": True, "avd_first": True}
    ),
    "skresnet18": resnet("skresnet18"),
    "skresnet50": resnet("skresnet50", (1, 2, 1, 1)),
    "resnetv2_18": resnet("resnetv2_18"),
    "resnetv2_50x1_bit": resnetv2(stem_type="fixed"),
    "resnetv2 with average pooling": resnetv2(stem_type="deep", avg_down=True, stem_chs=64),
    "resnetv2 with the activation after the addition": resnetv2(preact=False),
    "convnext_atto": named("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 12, 16, 16)),
    "convnext_tiny": named("convnext_tiny", depths=(1, 2, 1, 1), dims=(8, 8, 16, 16)),
    "convnext with the norm first, dilated": named(
        "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 12, 16, 16), output_stride=8, head_norm_first=True
    ),
    "convnextv2_atto": named("convnextv2_atto", depths=(1, 2, 1, 1), dims=(8, 12, 16, 16)),
    "vit": vit(),
    "vit with layer scale and registers": vit("vit_small_patch14_reg4_dinov2", patch_size=16, init_values=0.5),
    "vit with a norm before, pooled": vit(pre_norm=True, global_pool="avg", qk_norm=True, class_token=False),
    "vit with attention pooling": vit(global_pool="map"),
    "vit of any image size": vit(dynamic_img_size=True),
    "vit with the norm in the branch": vit(block_fn=block_fn("ResPostBlock"), init_values=0.5),
    "vit of parallel things": vit(block_fn=block_fn("ParallelThingsBlock"), init_values=0.5),
    "deit": vit("deit_tiny_distilled_patch16_224"),
    "deit3": vit("deit3_small_patch16_224"),
}


@cache
def net(name):
    """One of the nets, for tests that leave it as it is."""
    return shaken(NETS[name]())


@pytest.mark.parametrize("name", NETS)
def test_a_view_is_the_network(name):
    check_view(net(name))


def branch_ends(model):
    """The module that each branch ends in, without the drop path that is not there in most."""
    ends = {
        "timm.models.resnet.BasicBlock": ["bn2"],
        "timm.models.resnet.Bottleneck": ["bn3"],
        "timm.models.res2net.Bottle2neck": ["bn3"],
        "timm.models.resnest.ResNestBottleneck": ["bn3"],
        "timm.models.sknet.SelectiveKernelBasic": ["conv2"],
        "timm.models.sknet.SelectiveKernelBottleneck": ["conv3"],
        "timm.models.resnetv2.PreActBasic": ["conv2"],
        "timm.models.resnetv2.PreActBottleneck": ["conv3"],
        "timm.models.resnetv2.Bottleneck": ["norm3"],
        "timm.models.convnext.ConvNeXtBlock": ["drop_path"],
        "timm.models.vision_transformer.Block": ["drop_path1", "drop_path2"],
        "timm.models.vision_transformer.ResPostBlock": ["drop_path1", "drop_path2"],
    }
    kinds = ((module, f"{type(module).__module__}.{type(module).__qualname__}") for module in model.modules())
    # What follows the last norm, squeeze-and-excitation and its kin, makes zeros of zeros.
    return [getattr(module, name) for module, kind in kinds if kind in ends for name in ends[kind]]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet26d",
        "seresnet18",
        "ecaresnet26t",
        "res2net",
        "resnest14d",
        "skresnet18",
        "skresnet50",
        "resnetv2_18",
        "resnetv2_50x1_bit",
        "resnetv2 with average pooling",
        "resnetv2 with the activation after the addition",
        "convnext_tiny",
        "convnextv2_atto",
        "vit",
        "vit with layer scale and registers",
        "vit with the norm in the branch",
        "deit",
    ],
)
def test_a_deleted_step_is_a_silent_branch(name):
    check_deletions(dynamics(net(name)), branch_ends(net(name)))


@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_18", "convnextv2_atto", "vit with layer scale and registers"])
def test_gradients_pass_the_view_as_the_network(name):
    check_gradient(net(name))


@pytest.mark.parametrize(
    "build",
    [
        resnet("seresnet18", drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.2),
        resnet("res2net50_26w_4s", drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.2),
        resnet("resnest14d", drop_block_rate=0.2, drop_rate=0.2),  # its drop path draws where it has no effect, too
        resnet("skresnet18", drop_path_rate=0.5),
        resnet("resnetv2_18", drop_path_rate=0.5),
        resnetv2(preact=False, drop_path_rate=0.5),
        named("convnext_tiny", depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.5),
        vit(init_values=0.5, drop_path_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1),
    ],
    ids=["resnet", "res2net", "resnest", "sknet", "resnetv2", "resnetv2 post", "convnext", "vit"],
)
def test_drop_path_and_drop_block_belong_to_the_branches(build):
    check_training(shaken(build()))


def test_the_path_that_resnest_drops_is_that_of_its_downsampling():
    model = shaken(resnet("resnest14d", drop_path_rate=0.5)())
    step = next(step for step in dynamics(model).steps if step.label == "layer4.0")
    block, h = model.layer4[0].train(), torch.rand(8, *step.shapes[0])
    torch.manual_seed(0)
    expected = block(h)
    torch.manual_seed(0)
    assert_near(step(h), expected)
    torch.manual_seed(1)
    assert distance(step(h), expected) > 1e-3


# What the steps are


def said(model):
    return [(step.label, step.kind, step.stage) for step in timms.reader(model)(model).steps]


def test_labels_kinds_and_stages():
    assert said(NETS["resnet26d"]()) == [
        ("layer1.0", "residual", 0),
        ("layer1.1", "residual", 0),
        ("layer2.0", "residual", 1),
        ("layer3.0", "residual", 2),
        ("layer4.0", "residual", 3),
        ("layer4.1", "residual", 3),
    ]
    assert said(NETS["convnextv2_atto"]()) == [
        ("stages.0.0", "residual", 0),
        ("stages.1 downsampling", "transition", 1),
        ("stages.1.0", "residual", 1),
        ("stages.1.1", "residual", 1),
        ("stages.2 downsampling", "transition", 2),
        ("stages.2.0", "residual", 2),
        ("stages.3 downsampling", "transition", 3),
        ("stages.3.0", "residual", 3),
    ]
    assert [label for label, kind, stage in said(NETS["vit"]()) if (kind, stage) == ("residual", 0)] == [
        f"encoder {i} {word}" for i in range(3) for word in ("attention", "perceptron")
    ]
    assert said(NETS["resnetv2_18"]())[2:4] == [("stages.1.0", "residual", 1), ("stages.2.0", "residual", 2)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("resnet18", 8),
        ("resnet26d", 8),
        ("ecaresnet26t", 8),
        ("seresnet50", 16),
        ("resnet101", 33),
        ("resnetv2_50x1_bit", 16),
        ("convnext_atto", 12 + 3),
        ("convnextv2_atto", 12 + 3),
        ("vit_tiny_patch16_224", 24),
        ("vit_small_patch14_dinov2", 24),
        ("deit_tiny_distilled_patch16_224", 24),
    ],
)
def test_number_of_steps(name, steps):
    with torch.device("meta"):
        assert len(said(timm.create_model(name))) == steps


def test_a_vit_of_no_fixed_size_is_read_without_a_comparison():
    model = NETS["vit of any image size"]()
    model.patch_embed.img_size = None
    view = dynamics(model)
    assert view.steps[0].shapes is None


# What cannot be read


@pytest.mark.parametrize("name", ["ParallelScalingBlock", "DiffParallelScalingBlock"])
def test_attention_and_perceptron_side_by_side_are_refused_by_name(name):
    model = vit(block_fn=block_fn(name), num_heads=2)()
    with pytest.raises(
        InvalidInput, match=rf"what is computed in encoder 0 \(timm\.models\.vision_transformer\.{name}\), encoder 1"
    ):
        dynamics(model)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("cait_xxs24_224", "blocks_token_only"),
        ("eva02_tiny_patch14_224", "rope"),
        ("densenet121", "features"),
        ("mobilenetv3_small_050", "conv_stem"),
    ],
)
def test_another_architecture_is_refused_with_its_modules(name, modules):
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(InvalidInput, match=rf"cannot read a \w+ as steps: it holds .*{modules} \(.*by hand"):
        dynamics(model)
