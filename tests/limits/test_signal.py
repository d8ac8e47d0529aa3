"""States and gradients by depth against matrices, and the two ways of the gradient."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from linear_flows import D, data, inputs, labels, matrix, net_of, points, product, rate
from torch import nn

from resode import InvalidInput, NetConfig, Stack, build, dynamics
from resode.limits.signal import Signal, signal


def root_mean_square(h):
    return float(h.flatten(1).square().sum(1).mean().sqrt())


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_linear_flow_by_hand(solver):
    A, net = matrix(), net_of(solver, 4)
    found = signal(dynamics(net), data())
    whole = product(A, points(4), solver)
    with torch.no_grad():
        logits = net[1](inputs() @ whole.T)
        v = (logits.softmax(1) - F.one_hot(labels(), 3)) @ net[1].weight
    assert found.count == 7
    one = torch.eye(D, dtype=torch.float64)
    for i in reversed(range(4)):
        step = product(A, points(4)[i : i + 2], solver)
        assert found.gradients[i + 1] == pytest.approx(root_mean_square(v))
        branch = v @ (step - one)
        way = found.steps[i]
        assert (way.shortcut, way.branch) == pytest.approx((root_mean_square(v), root_mean_square(branch)))
        assert way.cosine == pytest.approx(float((v * branch).sum() / (v.norm() * branch.norm())))
        v = v @ step
    assert found.gradients[0] == pytest.approx(root_mean_square(v))
    for i, h in enumerate(found.states):
        assert h == pytest.approx(root_mean_square(inputs() @ product(A, points(4)[: i + 1], solver).T))
    # The branch of an Euler step is Δ a(t) A.
    if solver == "euler":
        assert found.steps[0].branch == pytest.approx(
            root_mean_square(0.25 * rate(0.0) * v @ torch.linalg.inv(one + 0.25 * A) @ A)
        )


@pytest.mark.parametrize(
    "settings",
    [{"net": "resnet", "depth": 14}, {"net": "resnet", "depth": 14, "kind": "preact", "scale": "skipinit"},
     {"net": "odenet", "steps": 2, "kind": "preact"}],
)  # fmt: skip
def test_gradients_are_autograds_and_the_two_ways_add_up(settings):
    config = NetConfig(width=4, channels=2, size=(8, 8), classes=3, stack=Stack(activation="tanh"), **settings)
    net = build(config, seed=0).double().eval()
    torch.manual_seed(0)
    x, y = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.randint(3, (5,))
    view = dynamics(net, x)
    found = signal(view, [(x[:2], y[:2]), (x[2:], y[2:])])
    h = view.stem(x).detach().requires_grad_()
    F.cross_entropy(view.head(view.run(h)), y, reduction="sum").backward()
    assert found.gradients[0] == pytest.approx(root_mean_square(h.grad))
    for way in found.steps:
        square = way.shortcut**2 + way.branch**2 + 2 * way.cosine * way.shortcut * way.branch
        assert math.sqrt(square) == pytest.approx(found.gradients[way.index])
    assert len(found.states) == len(found.gradients) == len(found.stages) + 1
    assert all(p.grad is None and p.requires_grad for p in net.stages.parameters()) or net.zero_grad() is None


def test_with_a_branch_of_factor_zero_the_gradient_goes_through_the_shortcut():
    config = NetConfig(net="resnet", depth=14, kind="preact", scale="skipinit", width=4, channels=2, size=(8, 8))
    x = torch.rand(3, 2, 8, 8)
    found = signal(dynamics(build(config, seed=0)), [(x, torch.zeros(3, dtype=torch.int64))])
    first = found.steps[0]
    assert (first.branch, first.cosine) == (0.0, 0.0)
    assert first.shortcut == pytest.approx(found.gradients[1])


def test_another_loss():
    net = net_of("euler", 2)
    found = signal(dynamics(net), data(), loss=lambda z, y: 2.0 * F.cross_entropy(z, y, reduction="sum"))
    assert found.gradients == pytest.approx([2 * g for g in signal(dynamics(net), data()).gradients])


def test_the_model_is_left_alone():
    net = net_of("euler", 2).train()
    signal(dynamics(net), data())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_plain_net_is_refused_and_a_signal_survives_json():
    with pytest.raises(InvalidInput, match="no step of the network is residual"):
        signal(dynamics(build(NetConfig(net="plain", depth=8, width=4, channels=2, size=(8, 8)))), data())
    found = signal(dynamics(nn.Sequential(*net_of())), data())
    assert Signal.from_dict(json.loads(json.dumps(found.to_dict()))) == found
