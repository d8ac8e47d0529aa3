"""Forward and back again, against matrices; and what tells discretization from ill-conditioning."""

import json

import pytest
import torch
from linear_flows import data, inputs, matrix, net_of, points, product
from torch import nn

from resode import InvalidInput, ODEBlock
from resode.limits.reconstruction import Reconstruction, reconstruction


@pytest.mark.parametrize(("solver", "steps"), [("euler", 8), ("rk4", 2)])
def test_errors_are_those_of_the_products_there_and_back(solver, steps):
    A = matrix()
    found = reconstruction(net_of(solver, steps), data())
    assert (found.count, found.factors) == (7, (1.0, 2.0, 4.0))
    (block,) = found.blocks
    for factor, error in zip(found.factors, block.errors, strict=True):
        grid = points(int(steps * factor))
        back = product(A, grid[::-1], solver) @ product(A, grid, solver)
        off = inputs() @ back.T - inputs()
        assert error == pytest.approx(float(off.norm() / inputs().norm()), rel=1e-8)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 3), ("heun", 3), ("ralston", 3), ("bosh3", 3), ("rk4", 5)]
)
def test_errors_fall_at_the_order_of_there_and_back(solver, order):
    """Of an even order p the leading errors forward and backward cancel: p + 1."""
    (block,) = reconstruction(net_of(solver, 16), data()).blocks
    assert block.order == order
    assert block.observed_orders == pytest.approx([order] * 2, abs=0.2)


def test_the_amplification_is_that_of_the_way_back():
    # In two directions the flow contracts by e^{−6} and not at all: a random change comes back mostly along the first.
    A = torch.diag(torch.tensor([-3.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    net = net_of("rk4", 64, A)
    x = inputs()
    (block,) = reconstruction(net, data()).blocks
    end = x @ product(A, points(256), "rk4").T
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(end.shape, generator=generator, dtype=torch.float64)
    change = noise @ product(A, points(256)[::-1], "rk4").T
    expected = float(change.norm() / noise.norm() * end.norm() / x.norm())
    assert block.amplification == pytest.approx(expected, rel=1e-5)
    assert block.amplification > 30
    assert block.rounding == block.amplification * torch.finfo(torch.float64).eps


def test_a_flow_that_loses_its_input_does_not_come_back_on_any_grid():
    """Contraction by e^{−40} beside a direction that is kept: on the way back rounding outgrows the input."""
    turn, _ = torch.linalg.qr(matrix())
    rates = torch.tensor([0.0, -20.0, -20.0, -20.0], dtype=torch.float64)
    (block,) = reconstruction(net_of("rk4", 128, turn @ rates.diag() @ turn.T), data()).blocks
    assert block.rounding > 1.0
    assert min(block.errors) > 0.1
    # All directions alike: a relative change comes back as it is.
    (block,) = reconstruction(net_of("rk4", 128, -20.0 * torch.eye(4, dtype=torch.float64)), data()).blocks
    assert block.amplification == pytest.approx(1.0, rel=1e-3)
    assert block.errors[-1] < 1e-3


def test_each_block_begins_with_what_the_net_gives_it():
    A, B = matrix(0), matrix(5)
    blocks = [net_of("euler", 4, each)[0] for each in (A, B)]
    found = reconstruction(nn.Sequential(*blocks), data())
    x = inputs() @ product(A, points(4)).T
    back = product(B, points(4)[::-1]) @ product(B, points(4))
    assert [block.name for block in found.blocks] == ["0", "1"]
    assert found.blocks[1].errors[0] == pytest.approx(float((x @ back.T - x).norm() / x.norm()))


class Rotation(nn.Module):
    """f(t, h) of three channels, the last of which begins as zero."""

    def forward(self, t, h):
        return torch.stack([-h[:, 1], h[:, 0], h[:, 0]], dim=1)


def test_extra_channels_come_back_as_zeros():
    net = nn.Sequential(ODEBlock(Rotation(), "rk4", 4, extra_channels=1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    (block,) = reconstruction(net, [(x, torch.zeros(6, dtype=torch.int64))]).blocks
    assert 0.0 < block.errors[0] < 1e-3
    assert block.observed_orders[1] == pytest.approx(5, abs=0.2)


def test_a_block_that_is_used_twice_is_refused():
    block = net_of()[0]
    with pytest.raises(InvalidInput, match="used twice"):
        reconstruction(nn.Sequential(block, block), data())


def test_a_reconstruction_survives_json():
    found = reconstruction(net_of(), data())
    assert Reconstruction.from_dict(json.loads(json.dumps(found.to_dict()))) == found
