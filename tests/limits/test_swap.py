"""Solver swaps against matrices: other solvers and steps of a linear flow are other products."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from linear_flows import data, inputs, labels, matrix, net_of, points, product
from torch import nn

from resode import InvalidInput, ODEBlock
from resode.limits.flow import Flow
from resode.limits.swap import Swap, swap


def logits_of(net, whole):
    with torch.no_grad():
        return net[1](inputs() @ whole.T)


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("solver", "steps"), [("euler", 8), ("rk4", 4)])
def test_errors_and_changes_are_those_of_the_products(solver, steps):
    net, A = net_of(solver, steps), matrix()
    found = swap(net, data())
    reference = logits_of(net, product(A, points(5 * steps), "rk4"))
    used = logits_of(net, product(A, points(steps), solver))
    assert found.used == ((solver, steps),)
    assert found.reference.steps == (5 * steps,)
    factors = [k for k in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0) if steps * k >= 1]
    expected = {("as trained", k): (solver, int(steps * k)) for k in factors}
    others = {"euler": {"rk4"}, "rk4": {"euler"}}[solver]
    expected |= {(other, 1.0): (other, steps) for other in others}
    looked_at = {(e.solver, e.factor): e for e in found.evaluations}
    assert set(looked_at) == {*expected, ("midpoint", 1.0)}
    for plan, (name, count) in expected.items():
        logits = logits_of(net, product(A, points(count), name))
        assert looked_at[plan].error == pytest.approx(off(logits, reference), rel=1e-9, abs=1e-15)
        assert looked_at[plan].change == pytest.approx(off(logits, used), rel=1e-9, abs=1e-15)
        assert looked_at[plan].accuracy == float((logits.argmax(1) == labels()).double().mean())
        assert looked_at[plan].loss == pytest.approx(float(F.cross_entropy(logits, labels())))
        assert looked_at[plan].flips == float((logits.argmax(1) != used.argmax(1)).double().mean())
        assert looked_at[plan].steps == (count,)
        assert looked_at[plan].nfe == count * {"euler": 1, "rk4": 4}[name]


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("bosh3", 3), ("rk4", 4)])
def test_the_observed_order_is_the_solvers(solver, order):
    found = swap(net_of(solver, 32), data())
    assert found.order == order
    assert found.observed_order == pytest.approx(order, abs=0.15)


def test_the_sensitivity_of_a_linear_net_is_that_of_its_matrix():
    A = matrix()
    net = net_of("rk4", 16, A)
    with torch.no_grad():
        net[1].bias.zero_()
    whole = net[1].weight.detach() @ product(A, points(16), "rk4")
    found = swap(net, data())
    # A random direction is stretched by some mean of the singular values, over what the data are stretched by.
    stretched = float((inputs() @ whole.T).norm() / inputs().norm())
    least, most = (float(s) for s in torch.linalg.svdvals(whole)[[-1, 0]])
    assert least / stretched / 3 < found.sensitivity < most / stretched
    assert found.rounding == found.sensitivity * torch.finfo(torch.float64).eps


class Threshold(nn.Module):
    """Logits for two classes, by whether the first coordinate exceeds a number."""

    def __init__(self, line):
        super().__init__()
        self.line = line

    def forward(self, h):
        return torch.stack([self.line - h[:, 0], h[:, 0] - self.line], dim=1)


class Growth(nn.Module):
    """f(t, h) = 2h: Euler's method with N steps multiplies by (1 + 2/N)^N, the flow by e²."""

    def forward(self, t, h):
        return 2.0 * h


def growing(steps=8):
    return nn.Sequential(ODEBlock(Growth(), "euler", steps), Threshold(5.0))


def test_accuracy_lost_and_its_margin_are_those_of_paired_samples():
    # The steps 8, 16, 32 multiply by 5.96, 6.59, 6.96: samples between 5/6.96 and 5/5.96 change their class.
    x = torch.linspace(0.5, 1.5, 41, dtype=torch.float64).unsqueeze(1)
    y = (x[:, 0] * (1 + 2 / 8) ** 8 > 5).long()
    found = swap(growing(), [(x, y)])
    for each in (*found.evaluations, found.reference):
        if each.solver == "as trained":
            steps = each.steps[0]
            right = (x[:, 0] * (1 + 2 / steps) ** steps > 5).long() == y
            lost = int((~right).sum())
            assert each.lost == pytest.approx(lost / 41)
            assert each.lost_margin == pytest.approx(1.959964 * math.sqrt(lost - lost * lost / 41) / 41, abs=1e-6)
    assert found.own(4.0).lost > found.own(2.0).lost > found.own(1.0).lost == 0.0


def test_the_critical_steps_are_the_least_from_which_on_nothing_is_lost():
    # At 5/e² + δ the flow is above the line; Euler's method reaches it with N ≥ 32 alone.
    x = torch.full((10, 1), 5.0 / (1 + 2 / 31) ** 31, dtype=torch.float64)
    y = torch.ones(10, dtype=torch.int64)
    assert swap(growing(8), [(x, y)]).critical_steps == (32,)
    assert swap(growing(32), [(x, y)]).critical_steps == (32,)
    found = swap(growing(4), [(x, y)])
    assert found.critical is None
    assert found.critical_steps is None
    assert swap(growing(4), [(10 * x, y)]).critical_steps == (1,)
    # Right on its own grid alone: (1 + 2/4)⁴ = 5.06, and 5.96 with 8 steps.
    x = torch.full((10, 1), 5.0 / 5.5, dtype=torch.float64)
    assert swap(growing(4), [(x, torch.zeros(10, dtype=torch.int64))]).critical is None


def test_data_are_used_up_to_the_number_of_samples():
    batches = data((5, 2))
    found = swap(net_of(), batches, samples=6)
    assert found.count == 6

    def endless():
        yield batches[0]
        pytest.fail("no more was needed")

    assert swap(net_of(), endless(), samples=5).count == 5


def test_a_block_that_chooses_its_steps_is_refined_by_its_tolerances():
    net = net_of("dopri5", None, rtol=1e-3, atol=1e-4)
    seen = []
    net[0].register_forward_pre_hook(lambda block, _: seen.append((block.rtol, block.atol)))
    found = swap(net, data((5,)))
    for factor in (1, 2, 4, 5):
        assert any(pair == pytest.approx((1e-3 / factor**5, 1e-4 / factor**5)) for pair in seen)
    assert {e.factor for e in found.evaluations} == {1.0, 2.0, 4.0}
    assert found.own(4.0).error < found.own(1.0).error
    assert (net[0].rtol, net[0].atol, net[0].steps) == (1e-3, 1e-4, None)


def test_a_grid_with_breakpoints_is_coarsened_only_as_far_as_they_allow():
    class Pieces(nn.Module):
        breakpoints = (0.5,)

        def forward(self, t, h):
            return h

    found = swap(nn.Sequential(ODEBlock(Pieces(), "euler", 8)), data())
    assert sorted(e.factor for e in found.evaluations if e.solver == "as trained") == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_settings_and_modes_are_left_as_they_were():
    net = net_of("heun", 4).train()
    found = swap(net, data())
    assert (net[0].solver, net[0].steps, net.training, net[0].training) == ("heun", 4, True, True)
    assert swap(net.eval(), data()) == found


def test_a_swap_survives_json():
    found = swap(net_of(), data())
    assert Swap.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidInput, match="unknown solver 'rk5'"):
        swap(net_of(), data(), solvers=["rk5"])
    with pytest.raises(InvalidInput, match="no data"):
        swap(net_of(), [])
    with pytest.raises(InvalidInput, match="samples is 0"):
        swap(net_of(), data(), samples=0)
    with pytest.raises(InvalidInput, match="no pair"):
        swap(net_of(), [torch.zeros(3, 4)])
    with pytest.raises(InvalidInput, match="has no ODE block"):
        Flow(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="cannot be lifted"):
        swap(nn.Linear(4, 2), data())
