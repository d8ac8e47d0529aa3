"""Distance to the flow against matrix exponentials, and the bound of theory above it."""

import json
import math
from itertools import pairwise

import pytest
import torch
from linear_flows import D, data, flow, inputs, matrix, net_of, points, product, rate
from torch import nn

from resode import ODEBlock, ResidualBlock
from resode.limits.distance import Distance, distance
from resode.limits.exponents import fit_exponent


def test_states_of_a_linear_flow_against_matrix_exponentials():
    A = matrix()
    found = distance(net_of("euler", 8), data())
    (block,) = found.blocks
    assert block.times == tuple(points(8))
    assert found.worst == max(block.relative)
    for i, t in enumerate(points(8)):
        exact = inputs() @ flow(A, t).T
        off = (inputs() @ product(A, points(8)[: i + 1]).T - exact).norm(dim=1)
        # The reference solve, of 40 steps of rk4, is off by 1e-7 itself.
        assert block.relative[i] == pytest.approx(float(off.norm() / exact.norm()), rel=1e-4, abs=1e-12)
        assert block.largest[i] == pytest.approx(float(off.max()), rel=1e-4, abs=1e-12)
        assert block.states[i] == pytest.approx(float(exact.square().sum(1).mean().sqrt()), rel=1e-6)


def test_the_bound_is_that_of_a_one_step_method():
    A, times = matrix(), points(8)
    (block,) = distance(net_of("euler", 8), data()).blocks
    one = torch.eye(D, dtype=torch.float64)
    local = 0.0
    for start, end in pairwise(times):
        h = inputs() @ flow(A, start).T
        made = h @ (one + (end - start) * rate(start) * A).T
        local = max(local, float((made - inputs() @ flow(A, end).T).norm(dim=1).max()) / (end - start))
    lipschitz = float(torch.linalg.svdvals(A)[0]) * rate(times[-2])
    assert block.local == pytest.approx(local, rel=1e-4)
    assert block.lipschitz == pytest.approx(lipschitz, rel=0.02)
    assert block.lipschitz <= lipschitz * (1 + 1e-9)
    for t, bound in zip(times, block.bound, strict=True):
        assert bound == pytest.approx(block.local * math.expm1(block.lipschitz * t) / block.lipschitz)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
@pytest.mark.parametrize("seed", range(3))
def test_no_state_is_farther_than_the_bound(solver, seed):
    (block,) = distance(net_of(solver, 4, matrix(seed)), data()).blocks
    assert all(off <= bound * 1.02 + 1e-12 for off, bound in zip(block.largest, block.bound, strict=True))


def test_the_bound_of_eulers_method_is_sanders():
    """d_j/Δ ≤ ½ Δ max‖h″‖: for dh/dt = a h, h″ = a² h."""

    class Growth(nn.Module):
        def forward(self, t, h):
            return 1.5 * h

    x = torch.linspace(1.0, 2.0, 5, dtype=torch.float64).unsqueeze(1)
    net = nn.Sequential(ODEBlock(Growth(), "euler", 256))
    (block,) = distance(net, [(x, torch.zeros(5, dtype=torch.int64))]).blocks
    second = 1.5**2 * 2.0 * math.exp(1.5)
    sander = 0.5 / 256 * second * math.expm1(1.5) / 1.5
    assert block.bound[-1] == pytest.approx(sander, rel=0.01)


def test_a_block_that_chooses_its_steps_has_no_bound():
    (block,) = distance(net_of("dopri5", None, rtol=1e-4, atol=1e-4), data()).blocks
    assert block.bound is block.lipschitz is block.local is None
    assert len(block.times) == 9
    assert 0.0 < max(block.relative) < 1e-3


def test_a_distance_survives_json():
    found = distance(net_of(), data())
    assert Distance.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# Residual nets and what they are lifted to


class Layer(nn.Module):
    """f(h) = tanh(W h)."""

    def __init__(self, W):
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False, dtype=torch.float64)
        self.linear.weight = nn.Parameter(W)

    def forward(self, t, h):
        return torch.tanh(self.linear(h))


def smooth_net(depth, seed):
    """Blocks h + f(W_l, h)/L with W_l = W(l/L) and W(t) = A + B cos 2t + C sin 3t."""
    A, B, C = (matrix(3 * seed + i, 1.0) for i in range(3))
    times = [i / depth for i in range(depth)]
    return nn.Sequential(
        *(ResidualBlock(Layer(A + B * math.cos(2 * t) + C * math.sin(3 * t)), scale=1 / depth, t=t) for t in times)
    )


def test_smooth_weights_at_one_over_depth_approach_the_ode_at_order_1():
    """Euler's method against the lifted ODE: ‖h_l − h(l/L)‖ falls as 1/L, with a remainder of 1/L²."""
    found = {
        seed: {depth: distance(smooth_net(depth, seed), data()).worst for depth in (4, 8, 16, 32, 64)}
        for seed in range(3)
    }
    exponent = fit_exponent(found)
    assert exponent.mean == pytest.approx(-1.0, abs=0.1)
    assert exponent.local[-1] == pytest.approx(-1.0, abs=0.05)


def test_independent_weights_do_not_approach_any_ode():
    """At 1/√L they make a random walk, and the flow through them another: the distance does not fall with the depth."""

    def net_of_noise(depth, seed):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(depth, D, D, generator=generator, dtype=torch.float64)
        blocks = [ResidualBlock(Layer(W), scale=depth**-0.5, t=i / depth) for i, W in enumerate(draws)]
        return nn.Sequential(*blocks)

    for depth in (4, 64):
        worst = [distance(net_of_noise(depth, s), data()).worst for s in range(3)]
        assert min(worst) > 0.05
