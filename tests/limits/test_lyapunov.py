"""Lyapunov exponents against the singular values of products of matrices."""

import json
import math

import pytest
import torch
import torchvision
from linear_flows import D, data, matrix, net_of, points, product
from torch import nn

from resode import InvalidInput, ODEBlock, ResidualBlock, Stack, dynamics
from resode.blocks import Branch
from resode.limits.lyapunov import Lyapunov, lyapunov


def diagonal(*rates):
    return torch.diag(torch.tensor(rates, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("seed", range(3))
def test_exponents_of_a_linear_flow_are_logarithms_of_singular_values(solver, seed):
    A = matrix(seed)
    found = lyapunov(dynamics(net_of(solver, 4, A)), data(), sweeps=100)
    (stretch,) = found.stretches
    expected = torch.linalg.svdvals(product(A, points(4), solver)).log()
    assert (found.count, stretch.depth, stretch.duration) == (7, 4, 1.0)
    assert stretch.exponents == pytest.approx(expected.tolist(), abs=1e-6)
    assert stretch.deviations == pytest.approx([0.0] * D, abs=1e-6)


def test_exponents_of_a_flow_in_fixed_directions_are_its_rates():
    """a(t) integrates to 2: a direction of rate r grows by e^{2r}."""
    A = diagonal(1.0, 0.3, -0.4, -2.0)
    (stretch,) = lyapunov(dynamics(net_of("rk4", 32, A)), data(), sweeps=20).stretches
    assert stretch.exponents == pytest.approx([2.0, 0.6, -0.8, -4.0], abs=1e-4)


def test_all_exponents_together_are_the_logarithm_of_the_volume_whatever_the_directions():
    A = matrix(1)
    (stretch,) = lyapunov(dynamics(net_of("euler", 4, A)), data(), sweeps=0).stretches
    volume = torch.linalg.det(product(A, points(4))).abs().log()
    assert math.fsum(stretch.exponents) == pytest.approx(float(volume))


def test_they_are_per_unit_of_time():
    class Growth(nn.Module):
        def forward(self, t, h):
            return 0.5 * h

    net = nn.Sequential(ODEBlock(Growth(), "rk4", 16, t0=1.0, t1=5.0))
    (stretch,) = lyapunov(dynamics(net), data()).stretches
    assert stretch.duration == 4.0
    assert stretch.exponents == pytest.approx([0.5] * 4, abs=1e-5)
    blocks = nn.Sequential(*(ResidualBlock(Growth(), scale=0.1) for _ in range(10)))
    (stretch,) = lyapunov(dynamics(blocks), data(), directions=2).stretches
    assert stretch.exponents == pytest.approx([10 * math.log(1.05)] * 2)


def test_a_nonlinear_net_against_its_jacobian():
    torch.manual_seed(0)
    stack = Stack(norm="none", activation="tanh")
    net = nn.Sequential(*(ResidualBlock(Branch(3, stack, "mlp").double()) for _ in range(3)))
    x = torch.randn(5, 3, dtype=torch.float64)
    found = lyapunov(dynamics(net), [(x, torch.zeros(5, dtype=torch.int64))], sweeps=60, directions=2)
    values = [torch.linalg.svdvals(torch.func.jacrev(lambda h: net(h[None])[0])(one)).log() for one in x]
    tops = torch.stack(values)[:, :2].detach()
    assert found.stretches[0].exponents == pytest.approx(tops.mean(0).tolist(), abs=1e-5)
    assert found.stretches[0].deviations == pytest.approx(tops.std(0).tolist(), abs=1e-5)


def test_a_direction_that_is_lost_has_a_finite_exponent():
    class Loss(nn.Module):
        def forward(self, t, h):
            return -h

    (stretch,) = lyapunov(dynamics(nn.Sequential(ResidualBlock(Loss()))), data()).stretches
    assert stretch.exponents == pytest.approx([math.log(torch.finfo(torch.float64).tiny)] * 4)


def test_stages_each_and_a_foreign_net():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    found = lyapunov(dynamics(net, x), [(x, torch.zeros(2, dtype=torch.int64))], directions=2)
    assert [(s.stage, s.depth) for s in found.stretches] == [(0, 2), (1, 1), (2, 1), (3, 1)]
    for stretch in found.stretches:
        assert stretch.exponents[0] >= stretch.exponents[1]


def test_what_makes_no_sense_is_refused_and_exponents_survive_json():
    view = dynamics(net_of())
    with pytest.raises(InvalidInput, match="directions is 0"):
        lyapunov(view, data(), directions=0)
    with pytest.raises(InvalidInput, match="sweeps"):
        lyapunov(view, data(), sweeps=-1)
    found = lyapunov(view, data())
    assert Lyapunov.from_dict(json.loads(json.dumps(found.to_dict()))) == found
