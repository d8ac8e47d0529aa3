"""Weights and states from step to step: closed forms, and where the weights of a step are found."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torchvision
from linear_flows import D, data, inputs, matrix
from torch import nn

from resode import (
    Branch,
    InvalidInput,
    NetConfig,
    ODEBlock,
    ResidualBlock,
    ResidualDynamics,
    Stack,
    Step,
    build,
    dynamics,
)
from resode.limits.regularity import Regularity, regularity
from resode.limits.stretches import stretches


class Layer(nn.Module):
    """f(h) = W h."""

    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, t, h):
        return h @ self.W.T


def matrices(depth=5):
    return [matrix(i) for i in range(depth)]


def residual_net(scale=0.5):
    return nn.Sequential(*(ResidualBlock(Layer(W), scale=scale) for W in matrices()))


def root_mean_square(h):
    return float(h.square().sum(1).mean().sqrt())


def test_a_linear_residual_net_by_hand():
    Ws = matrices()
    found = regularity(dynamics(residual_net()), data())
    (stretch,) = found.stretches
    assert (found.count, stretch.stage, stretch.depth) == (7, 0, 5)
    h, states, increments = inputs(), [], []
    for W in Ws:
        states.append(root_mean_square(h))
        increments.append(root_mean_square(0.5 * h @ W.T))
        h = h + 0.5 * h @ W.T
    states.append(root_mean_square(h))
    displacement = root_mean_square(h - inputs())
    differences = [float((b - a).norm()) for a, b in pairwise(Ws)]
    norms = [float(W.norm()) for W in Ws]
    assert stretch.states == pytest.approx(states)
    assert stretch.increments == pytest.approx(increments)
    assert stretch.displacement == pytest.approx(displacement)
    assert stretch.weights == pytest.approx(norms)
    assert stretch.differences == pytest.approx(differences)
    assert stretch.sum == pytest.approx(float(sum(Ws).norm()))
    assert stretch.variation == pytest.approx(sum(differences))
    assert stretch.length == pytest.approx(sum(increments))
    assert stretch.quadratic == pytest.approx(math.sqrt(sum(i * i for i in increments)))
    assert stretch.relative_increment == pytest.approx(sum(i / h for i, h in zip(increments, states, strict=False)) / 5)
    assert stretch.straightness == pytest.approx(displacement / sum(increments))
    rough = math.sqrt(sum(d * d for d in differences) / 4) / math.sqrt(sum(n * n for n in norms) / 5)
    assert stretch.roughness == pytest.approx(rough)
    assert stretch.coherence == pytest.approx(float(sum(Ws).norm()) / sum(norms))


def test_independent_weights_have_a_roughness_of_root_two_and_equal_ones_none():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(64, D, D, generator=generator, dtype=torch.float64)
    rough = nn.Sequential(*(ResidualBlock(Layer(W), scale=0.01) for W in draws))
    (stretch,) = regularity(dynamics(rough), data()).stretches
    # Each of 64 · 16 entries adds its own noise: a tolerance of some 1/√1024.
    assert stretch.roughness == pytest.approx(math.sqrt(2), rel=0.1)
    assert stretch.coherence == pytest.approx(1 / 8, rel=0.3)
    tied = Layer(draws[0])
    (stretch,) = regularity(dynamics(nn.Sequential(*(ResidualBlock(tied) for _ in range(4)))), data()).stretches
    assert (stretch.roughness, stretch.variation) == (0.0, 0.0)
    assert stretch.coherence == pytest.approx(1.0)


@pytest.mark.parametrize(("time", "solver"), [("linear", "euler"), ("linear", "rk4"), ("constant", "euler")])
def test_the_total_variation_of_weights_on_knots_is_the_sum_over_the_knots(time, solver):
    torch.manual_seed(0)
    pieces = 4
    branch = Branch(D, Stack(norm="none"), "mlp", time, knots=pieces + (time == "linear")).double()
    (stretch,) = regularity(dynamics(nn.Sequential(ODEBlock(branch, solver, pieces))), data()).stretches
    theta = torch.cat([p.detach().flatten(1) for p in branch.parameters()], dim=1)
    jumps = (theta[1:] - theta[:-1]).norm(dim=1)
    assert stretch.variation == pytest.approx(float(jumps.sum()), rel=1e-6)
    assert stretch.weights == pytest.approx(theta[:pieces].norm(dim=1).tolist(), rel=1e-6)
    assert stretch.differences == pytest.approx(jumps[: pieces - 1].tolist(), rel=1e-6)


def test_the_total_variation_of_a_cosine():
    """θ(t) = √2 cos(πt) Θ goes from √2 Θ to −√2 Θ."""
    torch.manual_seed(0)
    branch = Branch(D, Stack(norm="none"), "mlp", "fourier", knots=2).double()
    with torch.no_grad():
        for p in branch.parameters():
            p[1] = p[0]
            p[0] = 0.0
    size = math.sqrt(sum(float(p.detach()[1].square().sum()) for p in branch.parameters()))
    (stretch,) = regularity(dynamics(nn.Sequential(ODEBlock(branch, "rk4", 3))), data()).stretches
    assert stretch.variation == pytest.approx(2 * math.sqrt(2) * size, rel=1e-6)


def test_a_constant_field_has_no_variation_and_a_field_without_weights_has_no_weights():
    torch.manual_seed(0)
    steady = nn.Sequential(ODEBlock(Branch(D, Stack(norm="none"), "mlp", "concat").double(), "euler", 3))
    (stretch,) = regularity(dynamics(steady), data()).stretches
    assert (stretch.variation, stretch.roughness) == (0.0, 0.0)

    class Bare(nn.Module):
        def forward(self, t, h):
            return -h

    (stretch,) = regularity(dynamics(nn.Sequential(ODEBlock(Bare(), "euler", 3))), data()).stretches
    assert stretch.weights is stretch.differences is stretch.variation is stretch.sum is None
    assert stretch.roughness is stretch.coherence is None
    assert stretch.increments[0] > 0.0


def test_weights_of_torchvisions_blocks_are_found_in_the_graph():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3).eval()
    for p in net.layer1.parameters():
        p.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    found = regularity(dynamics(net, x), [(x, torch.zeros(2, dtype=torch.int64))])
    assert [s.depth for s in found.stretches] == [2, 1, 1, 1]
    blocks = [torch.cat([p.detach().flatten() for p in block.parameters()]) for block in net.layer1]
    assert found.stretches[0].weights == pytest.approx([float(b.norm()) for b in blocks], rel=1e-5)
    assert found.stretches[0].differences == pytest.approx([float((blocks[1] - blocks[0]).norm())], rel=1e-5)
    assert not any(p.requires_grad for p in net.layer1.parameters())
    assert all(p.requires_grad for p in net.layer2.parameters())


def test_a_stretch_keeps_the_space_and_the_stage():
    config = NetConfig(net="resnet", depth=20, width=4, channels=2, size=(8, 8))
    found = stretches(dynamics(build(config, seed=0)))
    assert [(s.stage, s.first, s.depth, s.last) for s in found] == [(0, 0, 3, 3), (1, 4, 2, 6), (2, 7, 2, 9)]
    view = dynamics(build(NetConfig(net="odenet", steps=3, width=4, channels=2, size=(8, 8), extra_channels=1), seed=0))
    assert [(s.stage, s.depth, s.duration) for s in stretches(view)] == [(0, 3, 1.0), (1, 3, 1.0), (2, 3, 1.0)]


@pytest.mark.parametrize("time", ["constant", "linear", "fourier"])
def test_the_weights_of_a_shared_branch_that_varies_with_time_are_those_of_each_blocks_time(time):
    torch.manual_seed(0)
    shared = Branch(D, Stack(norm="none"), "mlp", time, knots=4).double()
    with torch.no_grad():
        for p in shared.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype))
    net = nn.Sequential(*(ResidualBlock(shared, scale=0.1, t=i / 4) for i in range(4)))
    theta = [torch.cat([p.detach().flatten() for p in shared.layers.parameters_at(i / 4).values()]) for i in range(4)]
    (stretch,) = regularity(dynamics(net), data()).stretches
    assert stretch.weights == pytest.approx([float(each.norm()) for each in theta])
    assert stretch.differences == pytest.approx([float((b - a).norm()) for a, b in pairwise(theta)])
    assert stretch.sum == pytest.approx(float(sum(theta).norm()))
    assert stretch.roughness > 0.3


def test_solves_and_blocks_in_a_row_have_the_variation_of_all_of_them():
    torch.manual_seed(0)

    def branch(time="linear"):
        return Branch(D, Stack(norm="none"), "mlp", time, knots=3 if time == "linear" else None).double()

    def knots(branch):
        theta = torch.cat([p.detach().flatten(1) for p in branch.parameters()], dim=1)
        return list(theta)

    one, other = branch(), branch()
    net = nn.Sequential(ODEBlock(one, "rk4", 2), *(ODEBlock(other, "rk4", steps, t1=3.0) for steps in (4, 2)))
    (stretch,) = regularity(dynamics(net), data()).stretches
    course = [*knots(one), *knots(other), *knots(other)]
    assert stretch.depth == 8
    assert stretch.variation == pytest.approx(sum(float((b - a).norm()) for a, b in pairwise(course)))
    assert [s.duration for s in stretches(dynamics(net))] == [pytest.approx(7.0)]
    # Blocks between the solves take a unit of time together; a field of another form than theirs has no difference.
    net = nn.Sequential(ResidualBlock(branch("none")), ODEBlock(one, "rk4", 2), ResidualBlock(Layer(matrix())))
    assert [s.duration for s in stretches(dynamics(net))] == [pytest.approx(2.0)]
    assert regularity(dynamics(net), data()).stretches[0].variation is None
    bare = nn.Sequential(ResidualBlock(Layer(matrix(1))), ODEBlock(Layer(matrix(2)), "rk4", 2))
    jump = float((matrix(2) - matrix(1)).norm())
    assert regularity(dynamics(bare), data()).stretches[0].variation == pytest.approx(jump)


def test_branches_of_different_forms_have_no_difference():
    torch.manual_seed(0)
    narrow, wide = (Branch(D, Stack(norm="none"), "mlp", expansion=e).double() for e in (1.0, 2.0))
    net = nn.Sequential(ResidualBlock(narrow), ResidualBlock(wide))
    (stretch,) = regularity(dynamics(net), data()).stretches
    assert stretch.weights is None
    assert stretch.displacement > 0.0


def test_a_view_made_by_hand_does():
    W = nn.Parameter(matrix())
    steps = [Step(kind="residual", branch=lambda t, h: h @ W.T) for _ in range(2)]
    (stretch,) = regularity(ResidualDynamics(nn.Identity(), steps, nn.Identity()), data()).stretches
    assert stretch.weights == pytest.approx([float(W.detach().norm())] * 2)


def test_a_plain_net_is_refused():
    with pytest.raises(InvalidInput, match="no step of the network is residual"):
        regularity(dynamics(build(NetConfig(net="plain", depth=8, width=4, channels=2, size=(8, 8)))), data())


def test_the_first_samples_count():
    view = dynamics(residual_net())
    first = data()[0][0][:3]
    found = regularity(view, data(), samples=3)
    assert found.count == 3
    assert found.stretches[0].states[0] == pytest.approx(root_mean_square(first))


def test_a_regularity_survives_json():
    found = regularity(dynamics(residual_net()), data())
    assert Regularity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
