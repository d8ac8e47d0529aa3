"""Discretized nets: ordinary blocks that make the steps of a solver, and nothing that solves."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from depth_nets import Wave, blocks, flows, images, kinds, net_of, off, points, run_of, seasoned
from torch import nn

from resode import (
    Branch,
    Dropout,
    InvalidInput,
    ODEBlock,
    ResidualBlock,
    Stack,
    dynamics,
    interval_time,
    solver_settings,
)
from resode.blocks import TABLEAUX, TIMES, ProjectedODE
from resode.layers import BatchNorm
from resode.layers import Dropout as DropoutLayer
from resode.limits import discretize, lift
from resode.limits.discretize import AddChannels, DropChannels, Increments


def ode(steps=4, solver="euler", time="concat", **settings):
    return net_of("odenet", steps=steps, solver=solver, time=time, **settings)


# The same net


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("solver", TABLEAUX)
def test_it_is_the_net_as_the_solver_solves_it(solver, time):
    net, x = ode(2, solver, time), images()
    discrete = discretize(net)
    assert not flows(discrete)
    with torch.no_grad():
        assert off(discrete(x), net(x)) < 1e-12


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dopri5"])
def test_solver_and_steps_may_be_others_than_the_nets_own(solver):
    net, x = ode(2, "midpoint", "linear"), images()
    discrete = discretize(net, 6, solver)
    assert [len(stage) for stage in discrete.stages] == [6, 7, 7]
    with torch.no_grad(), solver_settings(net, solver=solver, steps=6):
        assert off(discrete(x), net(x)) < 1e-12


def test_a_net_that_chooses_its_steps_is_discretized_with_given_ones():
    net, x = ode(None, "dopri5"), images()
    with pytest.raises(InvalidInput, match=r"dopri5 chooses its steps.*steps=32"):
        discretize(net)
    with torch.no_grad(), solver_settings(net, steps=3):
        expected = net(x)
    with torch.no_grad():
        assert off(discretize(net, 3)(x), expected) < 1e-12


def test_a_reversible_net_is_discretized_by_its_method_itself():
    net, x = ode(2, "rk4", gradient="reversible"), images()
    with torch.no_grad(), solver_settings(net, gradient="backprop"):
        assert off(discretize(net)(x), net(x)) < 1e-12


def test_each_block_has_the_weights_and_statistics_of_its_time():
    net = ode(4, "euler", "linear", knots=3)
    (flow, *_), stage = flows(net), discretize(net).stages[0]
    assert [(block.t, block.scale) for block in stage] == [(i / 4, 0.25) for i in range(4)]
    for i, block in enumerate(stage):
        # Knots at 0, 1/2 and 1.
        k, share = divmod(i / 4 * 2, 1)
        for name, stacked in flow.branch.named_parameters():
            expected = torch.lerp(stacked[int(k)], stacked[int(k) + 1], share)
            torch.testing.assert_close(block.branch.get_parameter(name), expected)
        for mine, its in zip(norms(block), norms(flow), strict=True):
            mean, variance = its.statistics(i / 4)
            torch.testing.assert_close(mine.running_mean, mean)
            torch.testing.assert_close(mine.running_var, variance)


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


def test_the_stages_of_a_step_have_the_piece_of_the_step_and_the_time_of_the_stage():
    net = ode(2, "rk4", "constant", knots=2)
    (flow, *_), (first, second) = flows(net), discretize(net).stages[0]
    for step, block in enumerate((first, second)):
        for stage, t in zip(block.branch.stages, (0, 0.25, 0.25, 0.5), strict=True):
            for name, stacked in flow.branch.named_parameters():
                assert torch.equal(stage.get_parameter(name), stacked[step])
            for mine, its in zip(norms(stage), norms(flow), strict=True):
                torch.testing.assert_close(mine.running_mean, its.statistics(step / 2 + t)[0])


def test_fields_that_jump_have_in_every_stage_the_piece_of_their_step():
    class Jump(nn.Module):
        """f(t, h) = h before t = 1/2, and −2h after it."""

        breakpoints = (0.5,)

        def forward(self, t, h):
            return h if interval_time(t) < 0.5 else -2.0 * h

    net, h = nn.Sequential(ODEBlock(Jump(), "rk4", 2)), points()

    def step(z):
        return sum(z**n / f for n, f in enumerate((1, 1, 2, 6, 24)))

    assert off(net(h), h * step(0.5) * step(-1.0)) < 1e-12
    assert off(discretize(net)(h), h * step(0.5) * step(-1.0)) < 1e-12


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_intervals_other_than_0_to_1_and_added_channels(solver):
    flow = ODEBlock(Branch(6, kind="mlp", time="linear", knots=4), solver, 3, t0=0.5, t1=2.0, extra_channels=2)
    net, x = seasoned(nn.Sequential(flow)), points()
    discrete = discretize(net)
    assert [type(module) for module in discrete] == [AddChannels, *[ResidualBlock] * 3, DropChannels]
    with torch.no_grad():
        assert off(discrete(x), net(x)) < 1e-12
    flow = seasoned(ODEBlock(Branch(5, Stack(norm="none")), solver, 2, extra_channels=2))
    with torch.no_grad():
        assert off(discretize(flow)(images()), flow(images())) < 1e-12


# There and back


RESIDUAL = {
    "untied": {},
    "post-activation, projected shortcuts": {"kind": "basic", "shortcut": "projection"},
    "SkipInit": {"scale": "skipinit", "kind": "basic"},
    "1/L, group norm": {"scale": "1/L", "stack": Stack(norm="group")},
    "no norm": {"stack": Stack(norm="none"), "scale": 0.3},
    "tied": {"tied": True, "time": "none"},
    "tied, time channel": {"tied": True, "time": "concat", "scale": "skipinit"},
    "one block a stage": {"depth": 14},
}


@pytest.mark.parametrize("basis", ["constant", "linear"])
@pytest.mark.parametrize("name", RESIDUAL)
def test_discretizing_what_was_lifted_gives_the_net_again(name, basis):
    net, x = net_of(**RESIDUAL[name]), images()
    again = discretize(lift(net, basis))
    with torch.no_grad():
        assert off(again(x), net(x)) < 1e-12
    assert kinds(again) == kinds(net)
    for mine, its in zip(blocks(again), blocks(net), strict=True):
        assert mine.t == pytest.approx(its.t, abs=1e-15)
        assert type(mine.post) is type(its.post)
        assert type(mine.scale) is type(its.scale)
        torch.testing.assert_close(mine.scale, its.scale, rtol=1e-14, atol=0)
    if "tied" not in name.split(", "):
        # Weights, statistics, counts and scales, by their names.
        held, found = net.state_dict(), again.state_dict()
        assert held.keys() == found.keys()
        for key, value in held.items():
            torch.testing.assert_close(found[key], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("times", [lambda i, n: 1 + 2 * i / n, lambda i, n: 0.3])
def test_branches_of_the_users_come_back_as_they_were(times):
    net, x = run_of([Wave(seed=s) for s in range(3)], times, scale=0.4), points()
    again = discretize(lift(net, "linear"))
    assert [type(block.branch) for block in again] == [Wave] * 3
    assert [block.t for block in again] == pytest.approx([block.t for block in net])
    assert again.state_dict().keys() == net.state_dict().keys()
    assert off(again(x), net(x)) < 1e-12


def test_a_lifted_net_with_a_finer_grid_is_a_deeper_net():
    net, x = net_of(kind="basic"), images()
    lifted = lift(net, "linear")
    deeper = discretize(lifted, 12)
    assert [len(stage) for stage in deeper.stages] == [12, 13, 13]
    with torch.no_grad(), solver_settings(lifted, steps=12):
        assert off(deeper(x), lifted(x)) < 1e-12


# Ordinary modules


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_it_is_copied_saved_and_loaded_like_any_net(solver):
    net, x = ode(2, solver, "film"), images()
    discrete, file = discretize(net), io.BytesIO()
    torch.save(discrete.state_dict(), file)
    file.seek(0)
    other = discretize(ode(2, solver, "film", seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for each in (other, copy.deepcopy(discrete)):
            assert torch.equal(each(x), discrete(x))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_it_trains_every_weight_it_has(solver):
    net, x, labels = discretize(ode(2, solver)).train(), images(12), torch.arange(12) % 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in net.parameters())


def test_blocks_share_nothing_with_each_other_or_the_net():
    net = ode(3, "rk4", "none")
    discrete = discretize(net)
    owners = [set(block.parameters()) for block in blocks(discrete)]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert not set(net.parameters()) & set(discrete.parameters())
    stages = [set(stage.parameters()) for stage in discrete.stages[0][0].branch.stages]
    assert sum(map(len, stages)) == len(set().union(*stages))


def test_modes_are_kept():
    for mode in (True, False):
        for solver in ("euler", "rk4"):
            discrete = discretize(ode(2, solver, extra_channels=1).train(mode))
            assert {module.training for module in blocks(discrete)} == {mode}
            assert {layer.training for layer in norms(discrete)} == {mode}


def test_dynamics_reads_it():
    net, x = ode(2, "rk4"), images()
    view = dynamics(discretize(net), x)
    assert [step.kind for step in view.steps] == ["residual"] * 8
    inner = [step for step in view.steps if isinstance(step.branch, Increments)]
    assert [step.scale for step in inner] == [0.5] * 6
    assert [step.t for step in inner] == [0.0, 0.5] * 3


class Drop(nn.Module):
    """f(t, h) = m·h for a mask m."""

    def __init__(self, p):
        super().__init__()
        self.drop = DropoutLayer(p)

    def forward(self, t, h):
        return self.drop(h)


def test_the_mask_of_a_step_serves_all_its_stages():
    flow = ODEBlock(Drop(0.5), "rk4", 2, mask_intervals=2)
    net, h = discretize(flow).train(), torch.ones(3, 40, dtype=torch.float64)

    def step(z):
        return sum(z**n / f for n, f in enumerate((1, 1, 2, 6, 24)))

    # In each step an element is kept, with z = Δ/(1 − p) = 1, or not.
    torch.manual_seed(0)
    out = net(h)
    values = torch.tensor([step(a) * step(b) for a in (0.0, 1.0) for b in (0.0, 1.0)], dtype=torch.float64)
    nearest = (out.flatten()[:, None] - values).abs().min(1).values
    assert float(nearest.max()) < 1e-12
    assert len({round(float(v), 6) for v in out.flatten()}) == 3
    assert not torch.equal(net(h), out)
    # It is drawn as the block with a mask for each step draws it.
    torch.manual_seed(0)
    assert off(flow.train()(h), out) < 1e-12
    twin = copy.deepcopy(net)
    assert len({id(layer) for layer in twin.modules() if isinstance(layer, DropoutLayer)}) == 2


def test_every_statistic_is_updated_once_a_batch():
    net = discretize(ode(2, "rk4", "none")).train()
    before = [int(layer.num_batches_tracked) for layer in norms(net)]
    net(images(6))
    assert [int(layer.num_batches_tracked) for layer in norms(net)] == [n + 1 for n in before]


# Where blocks stand


def test_a_block_alone_becomes_a_sequence():
    flow, x = ODEBlock(Wave(), "heun", 3), points()
    discrete = discretize(flow)
    assert type(discrete) is nn.Sequential
    assert off(discrete(x), flow(x)) < 1e-12


def test_a_block_in_two_places_becomes_the_same_blocks_in_both():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = ODEBlock(Wave(), "heun", 2)
            self.body = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), self.flow)

        def forward(self, x):
            return self.flow(self.body(x))

    net, x = Own(), points()
    discrete = discretize(net)
    assert off(discrete(x), net(x)) < 1e-12
    assert list(discrete.body)[1:] == list(discrete.flow)
    assert not flows(discrete)


def test_projected_dynamics_keep_their_projection():
    net, x = nn.Sequential(ProjectedODE(Wave(), nn.ReLU(), 5)), points().abs()
    discrete = discretize(net, 3)
    assert [type(block.post) for block in discrete] == [nn.ReLU] * 3
    with solver_settings(net, steps=3):
        assert off(discrete(x), net(x)) < 1e-12
    with pytest.raises(InvalidInput, match="solver='euler' alone, not 'rk4'"):
        discretize(net, 3, "rk4")


# Refusals


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (lambda: net_of(), {}, "Net has no ODE block to discretize"),
        (lambda: nn.Linear(3, 3), {"steps": 2}, "Linear has no ODE block"),
        (lambda: ode(4), {"solver": "rk5"}, "unknown Runge-Kutta method 'rk5'"),
        (lambda: ode(4), {"solver": "explicit_adams"}, "unknown Runge-Kutta method 'explicit_adams'"),
        (lambda: ode(4, "implicit_adams"), {}, "unknown Runge-Kutta method 'implicit_adams'"),
        (lambda: ode(4), {"steps": 0}, "steps is 0"),
        (lambda: ode(4, "rk4", gradient="reversible"), {}, "block is reversible.*gradient='backprop'"),
        (lambda: ode(4, time="constant"), {"steps": 3}, r"steps over the breakpoint t = 0\.25"),
    ],
)
def test_what_cannot_be_discretized_is_refused(make, settings, says):
    net = make()
    held = copy.deepcopy(net.state_dict())
    with pytest.raises(InvalidInput, match=says):
        discretize(net, **settings)
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())


def test_dropconnect_is_drawn_in_training_alone():
    net, x = ode(2, "heun", stack=Stack(dropout=Dropout(kind="dropconnect", p=0.3), norm="group")), images()
    discrete = discretize(net)
    with torch.no_grad():
        assert off(discrete(x), net(x)) < 1e-12
        assert off(discrete.train()(x), net(x)) > 1e-3


@pytest.mark.parametrize("time", ["concat", "linear"])
@pytest.mark.parametrize("conv", ["standard", "weight-standardized"])
def test_the_dropped_weights_of_a_step_are_those_of_all_its_stages(time, conv):
    stack = Stack(dropout=Dropout(kind="dropconnect", p=0.3), norm="group", conv=conv)
    flow = ODEBlock(
        Branch(3, stack, kind="preact", time=time, knots=3 if time == "linear" else None).double(), "rk4", 2
    )
    flow.mask_intervals = 2
    discrete, x = copy.deepcopy(discretize(flow)).train(), images()
    torch.manual_seed(0)
    out = discrete(x)
    torch.manual_seed(0)
    assert off(flow.train()(x), out) < 1e-12, "as the block with a mask for each step"
    assert off(discrete(x), out) > 1e-3
