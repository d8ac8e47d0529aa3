"""The stack: which layer each setting makes, and what is refused."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from resode.errors import InvalidInput
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout as DropoutLayer
from resode.layers.norm import NORMS, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PixelNorm
from resode.stack import ACTIVATIONS, Dropout, Stack

NORM_TYPES = {
    "batch": BatchNorm, "layer": LayerNorm, "pixel": PixelNorm,
    "instance": InstanceNorm, "group": GroupNorm, "none": nn.Identity,
}  # fmt: skip


def test_a_stack_is_frozen_and_compares_by_value():
    stack = Stack(norm="layer", dropout=Dropout("path", 0.2))
    with pytest.raises(FrozenInstanceError):
        stack.norm = "batch"
    assert stack == Stack(norm="layer", dropout=Dropout("path", 0.2))
    assert hash(stack) == hash(replace(stack))
    assert replace(stack, norm="batch") != stack


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batchnorm"}, "'batchnorm': choose from batch, layer, pixel, instance, group, none"),
        ({"norm_affine": "pixel"}, "'pixel': choose from channel, elementwise"),
        ({"activation": "ReLU"}, "'ReLU': choose from relu, .*sigmoid"),
        ({"conv": "separable"}, "'separable': choose from standard, weight-standardized"),
        ({"input_dropout": 1.0}, r"input dropout p is 1.0: .* \[0, 1\)"),
        ({"input_dropout": -0.5}, "input dropout p is -0.5"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Stack(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "alpha"}, "'alpha': choose from unit, spatial, dropconnect, cutout, path"),
        ({"schedule": "cosine"}, "'cosine': choose from constant, linear"),
        ({"p": 1.0}, "dropout p is 1.0"),
        ({"p": -0.1}, "dropout p is -0.1"),
        ({"p": float("nan")}, "dropout p is nan"),
    ],
)
def test_a_dropout_that_makes_no_sense_is_refused_at_once(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Dropout(**settings)


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    layer = Stack(norm=name).norm_layer(8)
    assert type(layer) is NORM_TYPES[name]
    x = torch.randn(4, 8, 5, 5)
    assert layer(x).shape == x.shape


def test_the_elementwise_map_needs_the_size():
    stack = Stack(norm="layer", norm_affine="elementwise")
    assert stack.norm_layer(8, (5, 3)).weight.shape == (8, 5, 3)
    with pytest.raises(InvalidInput, match="size"):
        stack.norm_layer(8)


def reference(name, x):
    """The activation from its formula."""
    return {
        "relu": lambda: x.clamp(min=0),
        "leaky-relu": lambda: torch.where(x > 0, x, 0.01 * x),
        "elu": lambda: torch.where(x > 0, x, x.exp() - 1),
        "gelu": lambda: x * torch.special.ndtr(x),
        "silu": lambda: x / (1 + (-x).exp()),
        "softplus": lambda: (1 + x.exp()).log(),
        "tanh": lambda: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "sigmoid": lambda: 1 / (1 + (-x).exp()),
    }[name]()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    torch.testing.assert_close(Stack(activation=name).activation_layer()(x), reference(name, x))


@pytest.mark.parametrize("norm", NORMS)
def test_a_convolution_has_a_bias_where_no_norm_follows(norm):
    assert (Stack(norm=norm).conv_layer(3, 4, 3).bias is not None) == (norm == "none")


def test_convolutions_keep_the_image_size_and_take_the_stacks_options():
    layer = Stack(conv="weight-standardized").conv_layer(4, 8, 3, time=True, groups=2, stride=2)
    assert isinstance(layer, Conv2d)
    assert layer.standardized
    assert layer.time_weight is not None
    assert layer(torch.randn(2, 4, 6, 8)).shape == (2, 8, 3, 4)
    plain = Stack().conv_layer(4, 8, 5)
    assert not plain.standardized
    assert plain.time_weight is None
    assert plain(torch.randn(2, 4, 6, 8)).shape == (2, 8, 6, 8)


def test_linear_layers():
    layer = Stack(dropout=Dropout("dropconnect", 0.3, inverted=False)).linear_layer(4, 8, time=True, bias=False)
    assert isinstance(layer, Linear)
    assert (layer.dropconnect, layer.inverted, layer.bias) == (0.3, False, None)
    assert layer.time_weight is not None


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.4, 0.4, 0.4]), ("linear", [0.0, 0.2, 0.4])])
def test_the_schedule_over_depth(schedule, rates):
    assert [Dropout(p=0.4, schedule=schedule).at(depth) for depth in (0.0, 0.5, 1.0)] == pytest.approx(rates)


WHERE = {"unit": "state", "spatial": "state", "cutout": "state", "path": "end", "dropconnect": "weights"}


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize(("kind", "where"), WHERE.items())
def test_each_dropout_acts_in_one_place_at_the_rate_of_its_depth(kind, where, schedule):
    stack = Stack(dropout=Dropout(kind, 0.4, schedule, inverted=False))
    rate = 0.4 if schedule == "constant" else 0.1
    layers = {"state": stack.dropout_layer(0.25), "end": stack.path_dropout_layer(0.25)}
    for place, layer in layers.items():
        if place == where:
            assert isinstance(layer, DropoutLayer)
            assert (layer.kind, layer.p, layer.inverted) == (kind, pytest.approx(rate), False)
        else:
            assert isinstance(layer, nn.Identity)
    expected = rate if where == "weights" else 0.0
    for weights in (stack.conv_layer(3, 3, 3, depth=0.25), stack.linear_layer(3, 3, depth=0.25)):
        assert weights.dropconnect == pytest.approx(expected)


def test_no_dropout_makes_no_layer():
    stack = Stack(dropout=Dropout("unit", 0.0))
    layers = [stack.dropout_layer(), stack.path_dropout_layer(), stack.input_dropout_layer()]
    linear = Stack(dropout=Dropout("path", 0.5, "linear"))
    assert all(isinstance(layer, nn.Identity) for layer in [*layers, linear.path_dropout_layer(0.0)])


def test_input_dropout_drops_single_elements():
    layer = Stack(input_dropout=0.3).input_dropout_layer()
    assert (layer.kind, layer.p) == ("unit", 0.3)
