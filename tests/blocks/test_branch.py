"""The residual branch: shapes, kinds, how time reaches it, and what is refused."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from resode.blocks.branch import EXPANSION, KINDS, TIMES, Branch
from resode.blocks.ode import ODEBlock
from resode.blocks.residual import PadShortcut, ResidualBlock
from resode.errors import InvalidInput
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout as DropoutLayer
from resode.layers.modulation import LayerScale
from resode.layers.norm import NORMS, LayerNorm
from resode.stack import Dropout, Stack

IMAGE_KINDS = [kind for kind in KINDS if kind != "mlp"]


def state(kind, channels=8, b=3, size=(7, 6)):
    shape = (b, channels) if kind == "mlp" else (b, channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def awake(branch):
    """A branch whose layer scale is 1 instead of 1e-6, so that its output can be told from 0.

    And whose parameters do vary, on a basis on which they are constant at first.
    """
    for layer in branch.modules():
        if isinstance(layer, LayerScale):
            nn.init.ones_(layer.weight)
    if branch.time == "fourier":
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter[1:] = 0.1 * torch.randn_like(parameter[1:])
    return branch


def layers_of(branch, *kinds):
    return [layer for layer in branch.modules() if isinstance(layer, kinds)]


# --- shapes and kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_keeps_the_shape(kind, time):
    h = state(kind)
    for t in (0.0, torch.tensor(0.5)):
        assert Branch(8, kind=kind, time=time)(t, h).shape == h.shape


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (5, 5)])
@pytest.mark.parametrize("norm", ["batch", "elementwise"])
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_stride_and_channels_change_the_shape_as_a_shortcut_does(kind, time, norm, size):
    stack = Stack(norm="layer", norm_affine="elementwise") if norm == "elementwise" else Stack()
    branch = Branch(8, stack, kind, time, out_channels=12, stride=2, size=size)
    h = state(kind, size=size)
    assert branch(0.5, h).shape == (3, 12, -(-size[0] // 2), -(-size[1] // 2))
    assert ResidualBlock(branch, PadShortcut(8, 12, 2))(h).shape[1:] == branch(0.5, h).shape[1:]


def shapes(branch):
    """(in, out, kernel, groups) of the branch's maps, in order."""
    return [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.groups)
        if isinstance(layer, Conv2d)
        else (layer.in_features, layer.out_features, 0, 1)
        for layer in layers_of(branch, Conv2d, Linear)
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("basic", [(16, 16, 3, 1), (16, 16, 3, 1)]),
        ("preact", [(16, 16, 3, 1), (16, 16, 3, 1)]),
        ("bottleneck", [(16, 4, 1, 1), (4, 4, 3, 1), (4, 16, 1, 1)]),
        ("convnext", [(16, 16, 7, 16), (16, 64, 1, 1), (64, 16, 1, 1)]),
        ("mlp", [(16, 64, 0, 1), (64, 16, 0, 1)]),
    ],
)
def test_each_kind_has_the_maps_of_its_source(kind, expected):
    assert shapes(Branch(16, kind=kind)) == expected


def test_preact_is_he_2016b_by_hand():
    torch.manual_seed(0)
    branch = Branch(8).double()
    norm1, conv1, norm2, conv2 = layers_of(branch, nn.modules.batchnorm._BatchNorm, Conv2d)
    h = state("preact").double()
    branch.eval()
    expected = conv2(torch.relu(norm2(conv1(torch.relu(norm1(h))))))
    torch.testing.assert_close(branch(0.0, h), expected)


def test_basic_is_he_2016a_by_hand():
    torch.manual_seed(0)
    branch = Branch(8, kind="basic").double().eval()
    conv1, norm1, conv2, norm2 = layers_of(branch, nn.modules.batchnorm._BatchNorm, Conv2d)
    h = state("basic").double()
    torch.testing.assert_close(branch(0.0, h), norm2(conv2(torch.relu(norm1(conv1(h))))))


def test_a_convnext_branch_is_small_at_first():
    h = state("convnext")
    assert Branch(8, kind="convnext")(0.0, h).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_expansion_is_the_width_inside(kind):
    inside = {shape[1] for shape in shapes(Branch(16, kind=kind, expansion=0.5))} - {16}
    assert inside == {8}
    default = {shape[1] for shape in shapes(Branch(16, kind=kind))} | {16}
    assert default == {16, int(16 * EXPANSION[kind])}


def test_the_width_inside_is_at_least_one():
    assert Branch(2, kind="bottleneck")(0.0, state("", 2)).shape == (3, 2, 7, 6)


@pytest.mark.parametrize(("kind", "norm"), sorted({*product(KINDS, NORMS)} - {("mlp", "instance")}))
def test_every_norm_stands_in_every_kind(kind, norm):
    h = state(kind)
    out = awake(Branch(8, Stack(norm=norm), kind))(0.0, h)
    assert out.shape == h.shape
    assert out.std() > 1e-3


def test_the_stack_chooses_the_activation():
    assert len(layers_of(Branch(8, Stack(activation="gelu")), nn.GELU)) == 2
    assert not layers_of(Branch(8, Stack(activation="gelu")), nn.ReLU)


def test_standardized_weights_reach_every_convolution():
    for kind in IMAGE_KINDS:
        branch = Branch(8, Stack(conv="weight-standardized"), kind)
        assert all(layer.standardized for layer in layers_of(branch, Conv2d))


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_time_reaches_the_branch_or_does_not(kind, norm):
    torch.manual_seed(0)
    h = state(kind)
    for time in TIMES:
        branch = awake(Branch(8, Stack(norm=norm), kind, time))
        near, far = branch(0.1, h), branch(0.9, h)
        assert torch.equal(near, far) == (time == "none")
        torch.testing.assert_close(branch(torch.tensor(0.9), h), far)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_concatenated_time_reaches_every_convolution(kind):
    assert all(layer.time_weight is not None for layer in layers_of(Branch(8, kind=kind, time="concat"), Conv2d))


def test_film_modulates_after_every_norm():
    names = [type(layer).__name__ for layer in Branch(8, kind="preact", time="film").layers]
    assert [names[i + 1] for i, name in enumerate(names) if name == "BatchNorm"] == ["FiLM", "FiLM"]


@pytest.mark.parametrize("time", ["concat", "film"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_time_has_a_gradient(kind, time):
    branch = awake(Branch(8, Stack(norm="layer", activation="tanh"), kind, time))
    h = state(kind)
    (branch(0.3, h) * torch.randn_like(h)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in branch.parameters())


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_path_dropout_drops_the_whole_branch_of_a_sample(kind):
    torch.manual_seed(0)
    h = state(kind, b=200)
    branch = awake(Branch(8, Stack(norm="layer", dropout=Dropout("path", 0.5)), kind))
    out = branch(0.0, h).flatten(1)
    gone = (out == 0).all(1)
    assert 60 < gone.sum() < 140
    assert (out[~gone] != 0).all()
    torch.testing.assert_close(out[~gone], 2 * branch.eval()(0.0, h).flatten(1)[~gone])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", ["unit", "spatial", "cutout"])
def test_dropout_of_the_state_stands_before_the_last_map_alone(kind, dropout):
    branch = Branch(8, Stack(dropout=Dropout(dropout, 0.5)), kind)
    layers = list(branch.layers)
    where = [i for i, layer in enumerate(layers) if isinstance(layer, DropoutLayer)]
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, Conv2d | Linear))
    assert where == [last - 1]


def test_the_linear_schedule_takes_the_branchs_depth():
    stack = Stack(dropout=Dropout("path", 0.4, "linear"))
    rates = [layers_of(Branch(8, stack, depth=depth), DropoutLayer) for depth in (0.0, 0.5, 1.0)]
    assert rates[0] == []
    assert [layer.p for (layer,) in rates[1:]] == pytest.approx([0.2, 0.4])
    weights = Branch(8, Stack(dropout=Dropout("dropconnect", 0.4, "linear")), depth=0.5)
    assert {layer.dropconnect for layer in layers_of(weights, Conv2d)} == {0.2}


# --- sizes and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_elementwise_map_follows_the_size_through_a_stride(kind):
    stack = Stack(norm="layer", norm_affine="elementwise")
    branch = Branch(8, stack, kind, out_channels=16, stride=2, size=(7, 6))
    sizes = {tuple(norm.weight.shape[1:]) for norm in layers_of(branch, LayerNorm)}
    assert sizes <= {(7, 6), (4, 3)}
    branch(0.0, state(kind))
    with pytest.raises(InvalidInput, match="elementwise"):
        branch(0.0, state(kind, size=(9, 9)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "resnet"}, r"'resnet': choose from basic, preact, bottleneck, convnext, mlp"),
        ({"time": "sin"}, r"'sin': choose from none, concat, film"),
        ({"kind": "mlp", "stride": 2}, r"no stride"),
        ({"kind": "mlp", "stack": Stack(norm="instance")}, r"instance norm"),
        ({"stride": 0}, r"stride 0"),
        ({"out_channels": 0}, r"8 to 0 channels"),
        ({"channels": 0}, r"0 to 0 channels"),
        ({"expansion": 0.0}, r"expansion is 0\.0: it must be a finite number above 0"),
        ({"expansion": -1}, r"expansion is -1"),
        ({"expansion": math.nan}, r"expansion is nan"),
        ({"stack": Stack(norm="layer", norm_affine="elementwise")}, r"size"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Branch(**{"channels": 8, **settings})


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (2, 7), (8,)])
def test_a_state_of_other_channels_is_refused(shape):
    for run in (lambda h: Branch(8)(0.0, h), ODEBlock(Branch(8)), ResidualBlock(Branch(8))):
        with pytest.raises(InvalidInput, match="8 channels"):
            run(torch.randn(shape))


@pytest.mark.parametrize(("kind", "shape"), [("basic", (8, 8, 5)), ("basic", (2, 8)), ("mlp", (2, 8, 8, 8))])
def test_a_state_of_other_axes_is_refused(kind, shape):
    """torch's convolutions would take (8, 8, 5) for one image, and its linear layers any axes before the last."""
    expected = r"\(B, 8\) is expected" if kind == "mlp" else r"\(B, 8, H, W\) is expected"
    for run in (lambda h: Branch(8, Stack(norm="none"), kind)(0.0, h), ODEBlock(Branch(8, Stack(norm="none"), kind))):
        with pytest.raises(InvalidInput, match=expected):
            run(torch.randn(shape))


@pytest.mark.parametrize("knots", [0, -1, 2.0])
def test_knots_are_a_whole_number_of_at_least_one(knots):
    with pytest.raises(InvalidInput, match=f"knots is {knots}: a whole number"):
        Branch(8, time="constant", knots=knots)


@pytest.mark.parametrize("time", ["none", "concat", "film"])
def test_knots_of_what_does_not_vary_are_refused(time):
    with pytest.raises(InvalidInput, match=f"knots is 4, and with time='{time}' .* constant, linear, fourier"):
        Branch(8, time=time, knots=4)


def test_by_default_parameters_vary_on_four_pieces():
    for time, knots in (("constant", 4), ("linear", 5), ("fourier", 4)):
        branch = Branch(8, time=time)
        assert {len(parameter) for parameter in branch.parameters()} == {knots}
        assert len(branch.breakpoints) == (0 if time == "fourier" else 3)


def test_repr_says_kind_and_time():
    assert "kind='basic', time='film'" in repr(Branch(8, kind="basic", time="film"))
    assert "kind='basic', time='linear', knots=3" in repr(Branch(8, kind="basic", time="linear", knots=3))
