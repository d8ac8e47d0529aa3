"""Where the order of the modules of a net is known."""

import pytest
import torch
from torch import nn

from resode import Branch, InvalidInput, ODEBlock, ResidualBlock, Stack
from resode.blocks.residual import PadShortcut
from resode.nets.sequences import block_sequences, is_sequence, keeps_shape, outside_branches, runs, spliced


def block(out_channels=4):
    branch = Branch(4, Stack(norm="none"), out_channels=out_channels)
    return ResidualBlock(branch, None if out_channels == 4 else PadShortcut(4, out_channels))


class Reversed(nn.Sequential):
    """Its forward pass is not the order of its children."""

    def forward(self, h):
        for layer in reversed(list(self)):
            h = layer(h)
        return h


class Twice(ResidualBlock):
    """Another map than a residual block's."""

    def forward(self, h):
        return super().forward(super().forward(h))


class Renamed(nn.Sequential):
    pass


def test_a_sequence_computes_its_children_in_their_order_and_nothing_else():
    assert is_sequence(nn.Sequential(nn.ReLU()))
    assert is_sequence(Renamed(nn.ReLU()))
    assert not is_sequence(Reversed(nn.ReLU()))
    assert not is_sequence(nn.ModuleList([nn.ReLU()]))


def test_a_step_is_a_residual_block_with_the_identity_as_its_shortcut():
    assert keeps_shape(block())
    assert not keeps_shape(block(8))
    assert not keeps_shape(Twice(Branch(4)))
    assert not keeps_shape(nn.ReLU())


def test_blocks_whose_order_is_not_known_are_refused():
    for holder in (Reversed(block()), nn.ModuleList([block()]), block()):
        with pytest.raises(InvalidInput, match=r"stands in no nn\.Sequential.*put the blocks of a stage into one"):
            block_sequences(nn.ModuleDict({"stage": holder}))
    stage = nn.Sequential(block(8), block())
    assert block_sequences(nn.ModuleDict({"stage": stage, "other": Reversed(nn.ReLU())})) == [stage]


def test_what_stands_within_a_branch_is_no_depth_of_the_net():
    for holder in (ResidualBlock, ODEBlock):
        field = nn.Module()
        field.inner = nn.Sequential(nn.Identity())
        net = nn.Sequential(holder(field))
        assert [name for name, _ in outside_branches(net) if "branch" in name] == []


def test_runs_are_cut_at_what_is_no_step():
    first, second, third, change, pool = block(), block(), block(), block(8), nn.ReLU()
    found = runs(nn.Sequential(first, second, change, pool, third))
    assert found == [(True, [first, second]), (False, [change, pool]), (True, [third])]
    assert runs(nn.Sequential()) == []


def test_several_modules_take_the_place_of_one():
    old, new = nn.ReLU(), [nn.Linear(3, 3), nn.Tanh()]
    h = torch.randn(2, 3)
    expected = torch.tanh(new[0](h))
    assert torch.equal(spliced(old, {old: new})(h), expected)
    inside = spliced(nn.Sequential(nn.Identity(), old), {old: new})
    assert list(inside)[1:] == new
    turned = spliced(Reversed(old), {old: new})
    assert isinstance(turned[0], nn.Sequential)
    assert torch.equal(turned(h), expected)
