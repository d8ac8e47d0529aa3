"""The residual block post(shortcut(h) + scale·f(t, h)), and its shortcuts."""

import math

import pytest
import torch
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.residual import PadShortcut, ProjectionShortcut, ResidualBlock, add_branch, make_shortcut
from resode.errors import InvalidInput
from resode.stack import Stack


class Twice(nn.Module):
    """f(t, h) = (2 + t)·h"""

    def forward(self, t, h):
        return (2.0 + t) * h


def images(b=2, c=3, h=5, w=4):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scale", "depth", "factor"),
    [(1.0, None, 1.0), (-0.25, None, -0.25), (0, None, 0.0), ("1/L", 8, 1 / 8), ("1/sqrt(L)", 8, 1 / math.sqrt(8))],
)
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_the_block_is_its_formula(scale, depth, factor, t):
    x, shortcut, post = images(), nn.Hardtanh(), nn.Softplus()
    block = ResidualBlock(Twice(), shortcut, scale, post, t, depth)
    torch.testing.assert_close(block(x), post(shortcut(x) + factor * (2.0 + t) * x))
    torch.testing.assert_close(ResidualBlock(Twice(), scale=scale, t=t, depth=depth)(x), x + factor * (2.0 + t) * x)


def test_skipinit_starts_as_the_identity_and_learns():
    block, x = ResidualBlock(Twice(), scale="skipinit"), images()
    assert torch.equal(block(x), x)
    assert [name for name, _ in block.named_parameters()] == ["scale"]
    block(x).sum().backward()
    assert block.scale.grad.item() == pytest.approx(2 * x.sum().item(), rel=1e-4)
    assert "scale" in block.state_dict()


def test_numbers_are_no_parameters():
    assert not list(ResidualBlock(Twice(), scale=0.5).parameters())


@pytest.mark.parametrize("depth", [None, 0, -3])
@pytest.mark.parametrize("scale", ["1/L", "1/sqrt(L)"])
def test_a_scale_by_depth_needs_the_depth(scale, depth):
    with pytest.raises(InvalidInput, match="depth=L"):
        ResidualBlock(Twice(), scale=scale, depth=depth)


def test_an_unknown_scale_is_refused_with_the_choices():
    with pytest.raises(InvalidInput, match=r"'zero'.*skipinit, 1/L, 1/sqrt\(L\)"):
        ResidualBlock(Twice(), scale="zero")


def test_shapes_that_differ_are_refused_even_where_they_would_broadcast():
    class Pools(nn.Module):
        def forward(self, t, h):
            return h.mean((2, 3), keepdim=True)

    with pytest.raises(InvalidInput, match=r"\(2, 3, 1, 1\).*\(2, 3, 5, 4\)"):
        ResidualBlock(Pools())(images())
    with pytest.raises(InvalidInput, match="shortcut that changes the shape"):
        ResidualBlock(Branch(3, out_channels=6))(images())
    with pytest.raises(InvalidInput, match="must agree"):
        add_branch(torch.ones(2, 3), torch.ones(3), 1.0)


# --- shortcuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "o"), [(3, 3), (3, 4), (3, 6), (3, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_padded_shortcut_takes_pixels_and_adds_channels_of_zeros(c, o, stride):
    x = images(c=c, h=7, w=6)
    out = PadShortcut(c, o, stride)(x)
    assert out.shape == (2, o, -(-7 // stride), -(-6 // stride))
    before = (o - c) // 2
    assert torch.equal(out[:, before : before + c], x[:, :, ::stride, ::stride])
    assert (out[:, :before] == 0).all()
    assert (out[:, before + c :] == 0).all()
    assert not list(PadShortcut(c, o, stride).parameters())


def test_a_padded_shortcut_cannot_take_channels_away():
    with pytest.raises(InvalidInput, match="shortcut='projection'"):
        PadShortcut(4, 2)


@pytest.mark.parametrize("norm", ["batch", "none", "layer"])
def test_a_projection_is_a_strided_convolution_of_single_pixels_and_a_norm(norm):
    torch.manual_seed(0)
    shortcut = ProjectionShortcut(3, 6, 2, Stack(norm=norm)).eval()
    conv, after = shortcut
    x = images()
    by_hand = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x[:, :, ::2, ::2])
    if conv.bias is not None:
        by_hand = by_hand + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(shortcut(x), after(by_hand))


def test_a_projections_elementwise_norm_takes_the_size_after_the_stride():
    stack = Stack(norm="layer", norm_affine="elementwise")
    assert make_shortcut("projection", 3, 6, 2, stack, (3, 2))(images()).shape == (2, 6, 3, 2)


def test_the_kinds_of_shortcut():
    assert isinstance(make_shortcut("pad", 3, 6, 2, Stack()), PadShortcut)
    assert isinstance(make_shortcut("projection", 3, 6, 2, Stack()), ProjectionShortcut)
    with pytest.raises(InvalidInput, match="'A': choose from pad, projection"):
        make_shortcut("A", 3, 6, 2, Stack())


@pytest.mark.parametrize("kind", ["pad", "projection"])
@pytest.mark.parametrize("branch_kind", ["basic", "preact", "bottleneck", "convnext"])
def test_every_shortcut_meets_every_branch(kind, branch_kind):
    branch = Branch(4, kind=branch_kind, out_channels=8, stride=2)
    block = ResidualBlock(branch, make_shortcut(kind, 4, 8, 2, Stack()), post=nn.ReLU())
    assert block(images(c=4)).shape == (2, 8, 3, 2)


def test_repr_says_time_and_scale():
    assert "t=0.5, scale=0.25" in repr(ResidualBlock(Twice(), scale=0.25, t=0.5))
    assert "scale=" not in repr(ResidualBlock(Twice(), scale="skipinit"))
