"""torchvision's networks seen as steps."""

from functools import cache

import pytest
import torch
from foreign_nets import check_deletions, check_gradient, check_training, check_view, distance, images, shaken
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import make_layers
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock, VisionTransformer

from resode import InvalidInput, Parts, Step, dynamics
from resode.dynamics import torchvision as torchvisions

VGG11 = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]


def vit(**settings):
    settings = {"hidden_dim": 16, "mlp_dim": 24, "num_classes": 5, **settings}
    return VisionTransformer(image_size=16, patch_size=8, num_layers=3, num_heads=2, **settings)


def convnext(**settings):
    widths = [(8, 12, 2), (12, 16, 1), (16, None, 2)]
    return ConvNeXt([CNBlockConfig(*each) for each in widths], num_classes=5, **settings)


def vgg(norm, layers=(4, "M", 6, 6, "M", 8, 8, "M")):
    """A narrow one: the two hidden layers of its classifier alone would have 120 million weights."""
    with torch.device("meta"):
        model = models.VGG(make_layers(list(layers), batch_norm=norm), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(layers[-2] * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
    return model.to_empty(device="cpu")


NETS = {
    "resnet18": lambda: models.resnet18(num_classes=5),
    "resnet50": lambda: ResNet(Bottleneck, [2, 1, 1, 2], 5),
    "resnext50_32x4d": lambda: ResNet(Bottleneck, [1, 1, 2, 1], 5, groups=32, width_per_group=4),
    "wide_resnet50_2": lambda: ResNet(Bottleneck, [1, 2, 1, 1], 5, width_per_group=128),
    "dilated": lambda: ResNet(Bottleneck, [1, 1, 2, 2], 5, replace_stride_with_dilation=[False, True, True]),
    "group norm": lambda: ResNet(BasicBlock, [2, 1, 1, 1], 5, norm_layer=lambda c: nn.GroupNorm(4, c)),
    "convnext": convnext,
    "vit": vit,
    "vit with a convolutional stem": lambda: vit(
        conv_stem_configs=[ConvStemConfig(8, 3, 2)] * 3, representation_size=7
    ),
    "vgg11": lambda: vgg(norm=False),
    "vgg11_bn": lambda: vgg(norm=True),
}


@cache
def net(name):
    """One of the nets, for tests that leave it as it is."""
    return shaken(NETS[name]())


@pytest.mark.parametrize("name", NETS)
def test_a_view_is_the_network(name):
    check_view(net(name))


def branch_ends(model):
    """The module that each branch ends in."""
    ends = {BasicBlock: ["bn2"], Bottleneck: ["bn3"], CNBlock: ["stochastic_depth"], EncoderBlock: ["dropout", "mlp"]}
    blocks = [module for module in model.modules() if type(module) in ends]
    return [getattr(block, name) for block in blocks for name in ends[type(block)]]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "convnext", "vit"])
def test_a_deleted_step_is_a_silent_branch(name):
    check_deletions(dynamics(net(name)), branch_ends(net(name)))


def test_a_deleted_layer_of_a_vgg_is_skipped():
    model = shaken(vgg(norm=True))
    view = dynamics(model)
    x = images(view)
    place = [step.label for step in view.steps].index("conv2_2")
    kept = [layer for i, layer in enumerate(model.features) if not 7 <= i < 10]
    assert [type(layer).__name__ for layer in model.features[7:10]] == ["Conv2d", "BatchNorm2d", "ReLU"]
    with view.evaluation():
        expected = model.classifier(model.avgpool(nn.Sequential(*kept)(x)).flatten(1))
        skipped = view.with_steps([*view.steps[:place], view.steps[place].deleted(), *view.steps[place + 1 :]])
        torch.testing.assert_close(skipped(x), expected)
        assert distance(expected, view(x)) > 1e-3
    with pytest.raises(InvalidInput, match="'conv2_1' is a plain layer that turns a state of shape"):
        view.steps[place - 1].deleted()


@pytest.mark.parametrize("name", ["resnet18", "convnext", "vit", "vgg11_bn"])
def test_gradients_pass_the_view_as_the_network(name):
    check_gradient(net(name))


@pytest.mark.parametrize(
    "build",
    [
        lambda: convnext(stochastic_depth_prob=0.5),
        lambda: vit(dropout=0.3, attention_dropout=0.2),
        lambda: vgg(norm=True),
    ],
    ids=["convnext", "vit", "vgg"],
)
def test_dropout_and_stochastic_depth_belong_to_the_branches(build):
    check_training(shaken(build()))


# What the steps are


@pytest.mark.parametrize("name", [name for name in models.list_models(module=models) if name.startswith("vgg")])
def test_steps_of_every_vgg(name):
    with torch.device("meta"):
        model = models.get_model(name, init_weights=False)
        steps = torchvisions.reader(model)(model).steps
    assert sum(step.kind == "plain" for step in steps) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert [step.label for step in steps if step.kind == "transition"] == [f"pool{i}" for i in range(1, 6)]
    assert steps[-1].label == "pool5"


RESIDUAL = {"ResNet": ("BasicBlock", "Bottleneck"), "ConvNeXt": ("CNBlock",), "VisionTransformer": ("EncoderBlock",)}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in models.list_models(module=models)
        if name.startswith(("resnet", "resnext", "wide_resnet", "convnext", "vit_"))
    ],
)
def test_steps_of_every_residual_net(name):
    with torch.device("meta"):
        model = models.get_model(name)
        steps = torchvisions.reader(model)(model).steps
    family = type(model).__name__
    blocks = [module for module in model.modules() if type(module).__name__ in RESIDUAL[family]]
    kinds = [step.kind for step in steps]
    assert kinds.count("residual") == len(blocks) * (2 if family == "VisionTransformer" else 1)
    assert kinds.count("transition") == len(steps) - kinds.count("residual") == (3 if family == "ConvNeXt" else 0)
    stages = [step.stage for step in steps]
    assert stages == sorted(stages)
    assert sorted(set(stages)) == ([0] if family == "VisionTransformer" else [0, 1, 2, 3])


def test_labels():
    def said(model):
        return [(step.label, step.kind, step.stage) for step in torchvisions.reader(model)(model).steps]

    assert said(ResNet(BasicBlock, [2, 1, 1, 1])) == [
        ("layer1.0", "residual", 0),
        ("layer1.1", "residual", 0),
        ("layer2.0", "residual", 1),
        ("layer3.0", "residual", 2),
        ("layer4.0", "residual", 3),
    ]
    assert said(convnext())[:5] == [
        ("stages.0.0", "residual", 0),
        ("stages.0.1", "residual", 0),
        ("stages.1 downsampling", "transition", 1),
        ("stages.1.0", "residual", 1),
        ("stages.2 downsampling", "transition", 2),
    ]
    assert [label for label, _, _ in said(vit())[:3]] == [
        "encoder 0 attention",
        "encoder 0 perceptron",
        "encoder 1 attention",
    ]
    assert said(vgg(norm=True))[:4] == [
        ("conv1_1", "plain", 0),
        ("pool1", "transition", 0),
        ("conv2_1", "plain", 1),
        ("conv2_2", "plain", 1),
    ]


def test_a_view_follows_its_network():
    model = shaken(ResNet(BasicBlock, [2, 1, 1, 1], 5)).eval()
    view = dynamics(model)
    x = images(view)
    with torch.no_grad():
        before = view(x)
        model.layer1[1].bn2.weight.mul_(-2.0)
        model.layer2[0].conv2 = nn.Conv2d(128, 128, 3, padding=1)
        assert torch.equal(view(x), model(x))
        assert distance(view(x), before) > 1e-3


def test_a_network_of_other_channels_and_another_stem_is_read():
    model = ResNet(BasicBlock, [1, 1, 1, 1], 5)
    model.conv1, model.maxpool, model.fc = nn.Conv2d(1, 64, 3), nn.Identity(), nn.Identity()
    view = dynamics(shaken(model))  # compared on images of one channel
    assert view.steps[-1].shapes[1] == (512, 8, 8)


def test_an_activation_of_any_kind_leaves_the_sum():
    model = ResNet(BasicBlock, [1, 1, 1, 1], 5)
    model.layer1[0].relu = nn.SiLU(inplace=True)
    model.layer2[0].relu = nn.PReLU()
    check_view(shaken(model))


# What cannot be read


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("densenet121", r"features \(Sequential\), classifier \(Linear\)"),
        ("mobilenet_v2", r"features \(Sequential\), classifier \(Sequential\)"),
        ("squeezenet1_1", r"features \(Sequential\), classifier \(Sequential\)"),
    ],
)
def test_another_architecture_is_refused_with_its_modules(name, modules):
    with torch.device("meta"):
        model = models.get_model(name)
    with pytest.raises(InvalidInput, match=rf"cannot read a \w+ as steps: it holds {modules}.*by hand"):
        dynamics(model)


class Halved(BasicBlock):
    def forward(self, x):
        return super().forward(x) / 2


class Halves(ResNet):
    def forward(self, x):
        return super().forward(x) / 2


class Renamed(ResNet):
    """A class of a user's own that computes what torchvision's does."""


def test_blocks_of_a_user_are_refused_by_name_and_place():
    model = ResNet(BasicBlock, [1, 2, 1, 1])
    model.layer2[1] = Halved(128, 128)
    model.layer4[0] = nn.Identity()
    with pytest.raises(
        InvalidInput,
        match=r"what is computed in layer2\.1 \(test_torchvision_nets\.Halved\), layer4\.0 \(torch\.nn\..*Identity\)",
    ):
        dynamics(model)


def test_a_class_that_inherits_is_read_if_it_computes_the_same():
    with pytest.raises(
        InvalidInput, match=r"it is a torchvision\.models\.resnet\.ResNet with a method 'forward' of its"
    ):
        dynamics(Halves(BasicBlock, [1, 1, 1, 1]))
    assert len(dynamics(Renamed(BasicBlock, [1, 1, 1, 1])).steps) == 4


def test_a_vgg_without_convolutions_and_a_vit_of_another_encoder_are_refused():
    model = vgg(norm=False)
    model.features = nn.Sequential(nn.ReLU())
    with pytest.raises(InvalidInput, match=r"no sequence with convolutions, but 0 \(ReLU\)"):
        dynamics(model)
    model = vit()
    model.encoder = nn.Identity()
    with pytest.raises(InvalidInput, match=r"what is computed in encoder \(torch\.nn\.modules\.linear\.Identity\)"):
        dynamics(model)


# By hand


def read_mobilenet(model):
    """The inverted residuals of MobileNetV2 (Sandler et al. 2018): linear bottlenecks, some with a shortcut."""

    def step(i, block):
        kind = "residual" if block.use_res_connect else "transition"
        return Step(kind=kind, branch=lambda t, h: block.conv(h), label=f"features.{i}")

    *blocks, last = model.features[1:]
    return Parts(
        stem=model.features[0],
        steps=[step(i, block) for i, block in enumerate(blocks, start=1)],
        head=lambda h: model.classifier(last(h).mean((2, 3))),
        shape=(3, 32, 32),
    )


def test_another_architecture_is_read_by_hand_and_a_wrong_reading_is_found():
    model = shaken(models.mobilenet_v2(num_classes=5))
    view = dynamics(model, read=read_mobilenet)
    assert sum(step.kind == "residual" for step in view.steps) == 10
    x = torch.rand(2, 3, 32, 32)
    with view.evaluation():
        torch.testing.assert_close(view(x), model(x))

    def without_shortcut(model):
        parts = read_mobilenet(model)
        steps = [Step(kind="plain", branch=step.branch, label=step.label) for step in parts.steps]
        return Parts(parts.stem, steps, parts.head, parts.shape)

    with pytest.raises(InvalidInput, match="the steps read from MobileNetV2 differ from it by"):
        dynamics(model, read=without_shortcut)
