"""LeNet-5, AlexNet and VGG: the layers their papers have, in their order."""

import math

import pytest
import torch
from torch import nn

from resode import Dropout, NetConfig, Stack
from resode.layers import NORMS
from resode.nets import PlainLayer, alexnet, build, lenet5, parameter_count, vgg

BARE = Stack(norm="none")
VGG = {11: (1, 1, 2, 2, 2), 13: 2, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
SMALL = {
    "lenet5": {"size": (13, 17)},
    "alexnet": {"size": (13, 11)},
    "vgg": {"size": (15, 9), "convs": (1, 2, 1)},
}


def small(net, **settings):
    return build(NetConfig(net=net, **{"channels": 2, "classes": 3, **SMALL[net], **settings}), seed=0)


def of_kind(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def without_memory(make, *args, **settings):
    """A net on the meta device, where weights have shapes and no values: the large ones cost nothing."""
    with torch.device("meta"):
        return make(*args, **settings)


def shapes_out_of(net, kind, x):
    """Shapes of what each module of a kind gives, in the order of their evaluation."""
    shapes = []
    for module in of_kind(net, kind):
        module.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    net.eval()(x)
    return shapes


# LeNet-5


@pytest.mark.parametrize("size", [(32, 32), (28, 28)])
def test_lenet5_has_the_parameters_and_the_maps_of_the_paper(size):
    net = lenet5(BARE, channels=1, size=size)
    assert parameter_count(net) == 61_706
    x = torch.rand(2, 1, *size)
    assert shapes_out_of(net, nn.Conv2d, x) == [(6, 28, 28), (16, 10, 10)]
    assert shapes_out_of(net, nn.AvgPool2d, x) == [(6, 14, 14), (16, 5, 5)]
    assert [layer.out_features for layer in of_kind(net, nn.Linear)] == [120, 84, 10]


def test_lenet5_pads_small_images_alone():
    assert shapes_out_of(lenet5(BARE, size=(28, 40)), nn.Conv2d, torch.rand(1, 3, 28, 40))[0] == (6, 28, 40)
    assert shapes_out_of(lenet5(BARE, size=(29, 40)), nn.Conv2d, torch.rand(1, 3, 29, 40))[0] == (6, 25, 36)


# AlexNet


def test_alexnet_has_five_convolutions_three_poolings_and_three_linear_layers():
    net = without_memory(alexnet, BARE)
    assert [layer.out_channels for layer in of_kind(net, nn.Conv2d)] == [64, 192, 384, 256, 256]
    assert [sum(isinstance(m, PlainLayer) for m in stage) for stage in net.stages] == [1, 1, 3]
    assert [type(stage[-1]) for stage in net.stages] == [nn.MaxPool2d] * 3
    assert [layer.out_features for layer in of_kind(net, nn.Linear)] == [1024, 1024, 10]
    convolutions = sum(9 * c * o + o for c, o in ((3, 64), (64, 192), (192, 384), (384, 256), (256, 256)))
    linear = sum(c * o + o for c, o in ((256 * 4 * 4, 1024), (1024, 1024), (1024, 10)))
    assert parameter_count(net) == convolutions + linear


# VGG


@pytest.mark.parametrize(
    ("name", "count", "parameters"),
    # Parameters of the convolutions, as of torchvision's vgg11().features and so on.
    [(11, 8, 9_220_480), (13, 10, 9_404_992), (16, 13, 14_714_688), (19, 16, 20_024_384)],
)
def test_vgg_has_the_convolutions_of_the_paper(name, count, parameters):
    net = without_memory(vgg, 5, VGG[name], BARE)
    convolutions = of_kind(net, nn.Conv2d)
    assert len(convolutions) == count
    each = VGG[name] if isinstance(VGG[name], tuple) else (VGG[name],) * 5
    channels = [o for o, n in zip((64, 128, 256, 512, 512), each, strict=True) for _ in range(n)]
    assert [layer.out_channels for layer in convolutions] == channels
    assert [layer.in_channels for layer in convolutions] == [3, *channels[:-1]]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert sum(p.numel() for layer in convolutions for p in layer.parameters()) == parameters
    assert parameter_count(net) == parameters + 512 * 10 + 10


def test_a_vgg_block_ends_with_a_pooling_that_halves():
    net = vgg(3, (1, 2, 1), BARE, size=(19, 8))
    x = torch.rand(1, 3, 19, 8)
    assert [len(stage) for stage in net.stages] == [2, 3, 2]
    assert [type(stage[-1]) for stage in net.stages] == [nn.MaxPool2d] * 3
    assert shapes_out_of(net, nn.MaxPool2d, x) == [(64, 9, 4), (128, 4, 2), (256, 2, 1)]


def test_one_number_of_convolutions_stands_for_every_block():
    one, each = (build(NetConfig(net="vgg", blocks=2, convs=n, size=(8, 8)), seed=0) for n in (2, (2, 2)))
    assert str(one) == str(each)


# Layers


def test_a_plain_layer_is_convolution_norm_activation_dropout():
    net = small("vgg", stack=Stack(dropout=Dropout(p=0.3)))
    for layer in of_kind(net, PlainLayer):
        assert [type(part).__name__ for part in layer.layers] == ["Conv2d", "BatchNorm", "ReLU", "Dropout"]
    for layer in of_kind(small("vgg", stack=BARE), PlainLayer):
        assert [type(part).__name__ for part in layer.layers] == ["Conv2d", "ReLU"]


@pytest.mark.parametrize("net", SMALL)
def test_a_convolution_has_a_bias_only_without_a_norm(net):
    assert all(layer.bias is None for layer in of_kind(small(net), nn.Conv2d))
    assert all(layer.bias is not None for layer in of_kind(small(net, stack=BARE), nn.Conv2d))


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("affine", ["channel", "elementwise"])
def test_elementwise_layer_norm_is_made_for_the_sizes_it_meets(net, affine):
    model = small(net, stack=Stack(norm="layer", norm_affine=affine))
    assert model(torch.rand(2, 2, *SMALL[net]["size"])).shape == (2, 3)
    assert any(p.ndim == 3 for p in model.parameters()) == (affine == "elementwise")


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "instance"])
def test_each_net_runs_with_each_norm(net, norm):
    model = small(net, stack=Stack(norm=norm, conv="weight-standardized", activation="silu"))
    logits = model(torch.rand(4, 2, *SMALL[net]["size"]))
    assert logits.shape == (4, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("net", SMALL)
def test_another_image_size_is_a_net_of_its_own(net):
    model = small(net, size=(40, 27))
    assert model(torch.rand(2, 2, 40, 27)).shape == (2, 3)


# Dropout


@pytest.mark.parametrize("net", SMALL)
def test_a_linear_dropout_rises_layer_by_layer_and_ends_at_p(net):
    model = small(net, stack=Stack(dropout=Dropout(p=0.4, schedule="linear")))
    rates = [layer.layers[-1].p for layer in of_kind(model, PlainLayer)]
    assert rates == sorted(set(rates))
    assert rates[0] > 0.0
    assert rates[-1] == 0.4
    if net != "lenet5":
        L = len(rates)
        assert rates == pytest.approx([0.4 * (i + 1) / L for i in range(L)])


@pytest.mark.parametrize("net", SMALL)
def test_a_constant_dropout_is_p_everywhere(net):
    model = small(net, stack=Stack(dropout=Dropout(p=0.4)))
    assert {layer.layers[-1].p for layer in of_kind(model, PlainLayer)} == {0.4}


@pytest.mark.parametrize("net", SMALL)
def test_dropconnect_rises_too_and_spares_the_classifier(net):
    model = small(net, stack=Stack(dropout=Dropout("dropconnect", 0.4, "linear")))
    rates = [layer.dropconnect for layer in of_kind(model, nn.Conv2d | nn.Linear) if hasattr(layer, "dropconnect")]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] == 0.4
    assert type(of_kind(model, nn.Linear)[-1]) is nn.Linear


@pytest.mark.parametrize("net", SMALL)
def test_dropout_acts_in_training_alone(net):
    x = torch.rand(4, 2, *SMALL[net]["size"])
    model = small(net, stack=Stack(norm="none", dropout=Dropout(p=0.5)))
    assert not torch.equal(model(x), model(x))
    # The same seed draws the same weights with dropout and without.
    assert torch.equal(model.eval()(x), small(net, stack=BARE)(x))


@pytest.mark.parametrize("net", SMALL)
def test_input_dropout_drops_pixels_before_the_first_layer(net):
    model = small(net, stack=Stack(norm="none", input_dropout=0.5))
    seen = []
    of_kind(model, nn.Conv2d)[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.ones(8, 2, *SMALL[net]["size"])
    model(x)
    model.eval()(x)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(seen[1], x)


# Initialization


def test_convolutions_are_he_normal_over_the_fan_out():
    torch.manual_seed(0)
    weight = of_kind(vgg(3, 1, BARE, size=(8, 8)), nn.Conv2d)[-1].weight
    assert weight.shape == (256, 128, 3, 3)
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert float(weight.detach().mean()) == pytest.approx(0.0, abs=1e-3)
    # Uniform weights of this deviation would end at 1.73 of it.
    assert float(weight.detach().abs().max()) > 4 * math.sqrt(2 / (9 * 256))
