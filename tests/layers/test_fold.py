"""Batch norms folded into the layer before them: the same map of one layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from resode import Branch, Stack
from resode.layers.conv import Conv2d, Linear
from resode.layers.fold import Folded, fold, foldable
from resode.layers.norm import BatchNorm

LAYERS = {
    "bare": lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, (3, 1), stride=2, groups=2),
    "reflecting": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    "1d": lambda: nn.Conv1d(3, 6, 3),
    "3d": lambda: nn.Conv3d(3, 6, 2),
    "linear": lambda: nn.Linear(3, 6),
    "ours": lambda: Conv2d(3, 6, 3, bias=False),
    "standardized": lambda: Conv2d(3, 6, 3, standardized=True),
    "dropped": lambda: Conv2d(3, 6, 3, dropconnect=0.3, inverted=False),
    "our linear": lambda: Linear(3, 6, bias=False),
}


def input_of(layer):
    channels = getattr(layer, "in_channels", None) or layer.in_features
    sizes = (5, 6, 7)[: len(getattr(layer, "kernel_size", ()))]
    return torch.randn(4, channels, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def norm_of(kind=BatchNorm, channels=6, **settings):
    """A batch norm that has seen data, in evaluation mode."""
    torch.manual_seed(1)
    norm = kind(channels, eps=0.1, **settings).double()
    with torch.no_grad():
        for held in (norm.weight, norm.running_var):
            if held is not None:
                held.uniform_(0.5, 2.0)
        for held in (norm.bias, norm.running_mean):
            if held is not None:
                held.normal_()
    return norm.eval()


def norm_after(layer, **settings):
    """torch's own, of the dimension that the layer's output has."""
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return norm_of(kinds[max(1, len(getattr(layer, "kernel_size", ())))], **settings)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_folded_layer_is_the_layer_and_its_norm(name, affine):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    for norm in (norm_of(affine=affine), norm_after(layer, affine=affine)):
        one, x = copy.deepcopy(layer), input_of(layer)
        expected = norm(one(x)).detach()
        assert foldable(one, norm)
        fold(one, norm)
        torch.testing.assert_close(one(x), expected, rtol=1e-12, atol=1e-12)
        assert norm(x) is x
        assert isinstance(norm, Folded)
        assert not norm.state_dict()
        assert not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("make", [lambda **k: Conv2d(3, 6, 3, time=True, **k), lambda **k: Linear(3, 6, time=True)])
def test_time_goes_on_through_the_folded_layer(make):
    torch.manual_seed(0)
    layer, norm = make(standardized=True).double().eval(), norm_of()
    x, times = input_of(layer), (0.0, 0.3, 1.0)
    expected = [norm(layer(x, t)).detach() for t in times]
    fold(layer, norm)
    for t, out in zip(times, expected, strict=True):
        torch.testing.assert_close(layer(x, t), out, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected[0], expected[1])


def test_products_are_rounded_once():
    layer, norm = nn.Conv2d(3, 6, 3), norm_of(nn.BatchNorm2d).float()
    wide, wide_norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    fold(layer, norm)
    fold(wide, wide_norm)
    assert torch.equal(layer.weight, wide.weight.float())
    assert torch.equal(layer.bias, wide.bias.float())


def test_a_layer_with_the_same_parameters_keeps_them():
    one, other = nn.Linear(3, 6).double(), nn.Linear(3, 6).double()
    other.weight, other.bias = one.weight, one.bias
    x = input_of(one)
    before = other(x)
    fold(one, norm_of())
    assert torch.equal(other(x), before)
    assert not torch.allclose(one(x), before)


@pytest.mark.parametrize("learning", [True, False])
def test_parameters_keep_whether_they_learn(learning):
    layer = nn.Linear(3, 6, bias=False).requires_grad_(learning)
    fold(layer, norm_of())
    assert layer.weight.requires_grad == layer.bias.requires_grad == learning


# What is not folded


class WithActivation(nn.BatchNorm2d):
    """As timm has them."""

    def forward(self, x):
        return super().forward(x).relu()


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).exp()


def test_what_does_more_than_its_name_says_is_not_folded():
    conv = nn.Conv2d(3, 6, 3)
    assert foldable(conv, norm_of())
    assert not foldable(conv, norm_of(WithActivation))
    assert not foldable(Shifted(3, 6, 3), norm_of())
    assert not foldable(nn.ConvTranspose2d(3, 6, 3), norm_of())
    assert not foldable(conv, nn.GroupNorm(2, 6))
    assert not foldable(norm_of(), norm_of())
    assert not foldable(conv, None)


def test_statistics_of_the_batch_or_of_several_t_are_not_folded():
    conv, norm = nn.Conv2d(3, 6, 3), norm_of()
    assert not foldable(conv, norm_of(nn.BatchNorm2d, track_running_stats=False))
    norm.set_knots((0.0, 1.0))
    assert not foldable(conv, norm)
    norm.set_knots((0.5,))
    assert foldable(conv, norm)


def test_parameters_that_vary_with_t_are_not_folded():
    branch = Branch(4, Stack(), "basic", "linear", knots=3)
    conv, norm = branch.layers[0], branch.layers[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, BatchNorm)
    assert not foldable(conv, norm)
    assert not foldable(conv, norm_of(channels=4))
    assert not foldable(nn.Conv2d(4, 4, 3), norm)


def test_what_is_made_of_other_parameters_or_looked_at_is_not_folded():
    norm = norm_of()
    assert not foldable(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), norm)
    conv = nn.Conv2d(3, 6, 3)
    handle = conv.register_forward_hook(lambda *_: None)
    assert not foldable(conv, norm)
    handle.remove()
    assert foldable(conv, norm)
    norm.register_forward_pre_hook(lambda *_: None)
    assert not foldable(conv, norm)


def test_channels_must_agree():
    assert not foldable(nn.Linear(3, 5), norm_of(channels=6))
