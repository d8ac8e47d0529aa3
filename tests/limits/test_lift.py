"""Lifted nets: the same net at its own depth, and between its blocks the field that its weights are said to make."""

import copy

import pytest
import torch
import torchvision
from depth_nets import Wave, blocks, flows, images, kinds, net_of, off, points, run_of, seasoned
from torch import nn
from torch.func import functional_call

from resode import (
    Branch,
    Dropout,
    InvalidInput,
    NetConfig,
    ODEBlock,
    ResidualBlock,
    Stack,
    build,
    dynamics,
    evaluate,
    solver_settings,
)
from resode.blocks import ProjectedODE
from resode.blocks.derived import Held, Varying
from resode.layers import BatchNorm
from resode.limits import lift
from resode.nets.sequences import keeps_shape

BASES = ("constant", "linear")
NETS = {
    "plain scale": {},
    "post-activation": {"kind": "basic"},
    "bottleneck, projected shortcuts": {"kind": "bottleneck", "shortcut": "projection", "width": 8},
    "convnext, 1/L": {"kind": "convnext", "scale": "1/L"},
    "SkipInit without norm": {"scale": "skipinit", "stack": Stack(norm="none")},
    "post-activation SkipInit": {"kind": "basic", "scale": "skipinit"},
    "group norm, 1/sqrt(L)": {"scale": "1/sqrt(L)", "stack": Stack(norm="group")},
    "standardized weights": {"stack": Stack(conv="weight-standardized", norm="layer")},
    "one block a stage": {"depth": 14},
    "tied": {"tied": True, "time": "none"},
    "tied, time channel": {"tied": True, "time": "concat", "scale": "1/L"},
    "tied, FiLM, SkipInit": {"tied": True, "time": "film", "scale": "skipinit"},
    "tied, pieces": {"tied": True, "time": "constant"},
    "tied, knots, post-activation": {"tied": True, "time": "linear", "kind": "basic"},
}


# The same net


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", NETS)
def test_at_its_own_depth_a_lifted_net_is_the_net(name, basis):
    net, x = net_of(**NETS[name]), images()
    held = copy.deepcopy(net.state_dict())
    lifted = lift(net, basis)
    with torch.no_grad():
        assert off(lifted(x), net(x)) < 1e-12
    assert not blocks(lifted)
    assert [(f.solver, f.steps, f.t0, f.t1) for f in flows(lifted)] == [
        ("euler", sum(map(keeps_shape, stage)), 0.0, 1.0) for stage in net.stages
    ]
    # Lifting copies: the net is as it was, and shares nothing.
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
    assert not set(net.parameters()) & set(lifted.parameters())
    assert lifted.input_shape == net.input_shape


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", ["plain scale", "post-activation SkipInit", "tied, FiLM, SkipInit"])
def test_in_training_it_is_the_net_too(name, basis):
    """Outputs by the batch's moments, gradients, and the statistics kept of them."""
    net, x = net_of(**NETS[name]).train(), images(8)
    lifted = lift(net, basis)
    outputs = [each(x) for each in (net, lifted)]
    assert off(outputs[1], outputs[0]) < 1e-12
    for out in outputs:
        out.square().sum().backward()
    for run, flow in zip(runs_of(net), flows(lifted), strict=True):
        L = len(run)
        for i, block in enumerate(run):
            for mine, its in zip(norms(block), norms(flow), strict=True):
                for seen, expected in zip(its.statistics(i / L), mine.statistics(i / L), strict=True):
                    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
        seen = {key: p.grad for key, p in flow.branch.named_parameters()}
        for key, g in seen.items():
            where = "scale" if key == "gain.0.weight" else key
            expected = torch.stack([block.get_parameter(where).grad for block in run])
            shared = name.startswith("tied") and where != "scale"
            torch.testing.assert_close(
                g if shared else g[:L], expected[0] if shared else expected, rtol=1e-9, atol=1e-12
            )
        assert len(seen) == len(list(run[0].parameters()))


def runs_of(net):
    return [[block for block in stage if keeps_shape(block)] for stage in net.stages]


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@pytest.mark.parametrize("kind", ["unit", "path", "dropconnect"])
def test_masks_are_drawn_for_each_interval_as_for_each_block(kind):
    net = net_of(stack=Stack(dropout=Dropout(kind=kind, p=0.4), norm="group")).train()
    lifted, x = lift(net), images()
    assert [flow.mask_intervals for flow in flows(lifted)] == [3, 2, 2]
    outputs = []
    for each in (net, lifted, lifted):
        torch.manual_seed(len(outputs) == 2)
        outputs.append(each(x))
    assert off(outputs[1], outputs[0]) < 1e-12
    assert off(outputs[2], outputs[0]) > 1e-3


def test_without_dropout_one_interval_of_masks_does():
    assert {flow.mask_intervals for flow in flows(lift(net_of(tied=True, time="none")))} == {1}


def test_a_linear_schedule_of_dropout_becomes_its_mean():
    net = net_of(stack=Stack(dropout=Dropout(p=0.3, schedule="linear")))
    means = [sum(layer.p for b in run for layer in drops(b)) / len(run) for run in runs_of(net)]
    assert [[layer.p for layer in drops(flow)] for flow in flows(lift(net))] == [[pytest.approx(m)] for m in means]
    assert len({layer.p for layer in drops(net)}) > 3


def drops(module):
    return [layer for layer in module.modules() if type(layer).__name__ == "Dropout"]


def test_with_the_scale_of_its_steps_it_is_the_net_of_pieces_that_build_makes():
    net, x = net_of(scale="1/L"), images()
    settings = {"time": "constant", "solver": "euler", "steps": (3, 2, 2)}
    shape = {"kind": "preact", "width": 4, "size": (6, 6), "classes": 3}
    ours = build(NetConfig(net="odenet", **settings, **shape), seed=1).double().eval()
    ours.load_state_dict(lift(net).state_dict())
    with torch.no_grad():
        assert off(ours(x), net(x)) < 1e-12


# Between the blocks


def naive(run, h, steps, basis):
    """Classical Runge–Kutta steps for dh/dt = L·s(t)·f_θ(t)(h) with weights read off the blocks by hand."""
    L = len(run)
    named = [block.branch.state_dict() for block in run]

    def field(t, h, middle):
        if basis == "constant":
            weights, share = min(int(middle * L), L - 1), 0.0
            now = after = weights
        else:
            now = min(int(middle * L), L - 1)
            share, after = t * L - now, min(now + 1, L - 1)
        kept = min(int(middle * L), L - 1)  # statistics are linear in t for both bases
        rise, following = t * L - kept, min(kept + 1, L - 1)
        values = {}
        for key in named[0]:
            a, b, c = (now, after, share) if "running" not in key else (kept, following, rise)
            values[key] = torch.lerp(named[a][key].double(), named[b][key].double(), c)
        scale = (1 - share) * float(run[now].scale) + share * float(run[after].scale)
        return L * scale * functional_call(run[0].branch, values, (t, h))

    for n in range(steps):
        t, d = n / steps, 1 / steps
        m = t + d / 2
        k1 = field(t, h, m)
        k2 = field(m, h + d / 2 * k1, m)
        k3 = field(m, h + d / 2 * k2, m)
        k4 = field(t + d, h + d * k3, m)
        h = h + d / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return h


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"scale": "skipinit"}, {"stack": Stack(norm="group"), "scale": 0.3}],
    ids=["plain", "skip", "group"],
)
def test_between_its_blocks_it_is_the_field_that_the_basis_says(settings, basis):
    net = net_of(**settings)
    lifted = lift(net, basis)
    h = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), solver_settings(lifted, solver="rk4", steps=6):
        assert off(flows(lifted)[0](h), naive(runs_of(net)[0], h, 6, basis)) < 1e-12


def test_weights_beyond_the_last_block_are_the_last_blocks():
    net = net_of()
    run, flow = runs_of(net)[0], flows(lift(net, "linear"))[0]
    for t, i in ((0.0, 0), (1 / 3, 1), (2 / 3, 2), (0.9, 2), (1.0, 2)):
        for name, value in flow.branch.branch.layers.parameters_at(t).items():
            torch.testing.assert_close(value, run[i].branch.layers.get_parameter(name), rtol=1e-14, atol=1e-14)
    assert flow.branch.branch.layers.basis.knots == 4
    assert flow.branch.breakpoints == pytest.approx((1 / 3, 2 / 3))


def test_grids_that_step_over_a_block_are_refused():
    lifted = lift(net_of())
    with solver_settings(lifted, solver="rk4", steps=4), pytest.raises(InvalidInput, match=r"breakpoint t = 0\.33"):
        lifted(images())


# Projected dynamics


def test_a_post_activation_net_lifts_to_projected_dynamics():
    net, x = net_of(kind="basic"), images()
    lifted = lift(net)
    assert [type(flow) for flow in flows(lifted)] == [ProjectedODE] * 3
    assert type(flows(lift(net_of()))[0]) is ODEBlock
    view = dynamics(lifted, x)
    assert [type(step.post) for step in view.steps if step.end is not None] == [nn.ReLU] * 7
    with solver_settings(lifted, solver="rk4", steps=6), pytest.raises(InvalidInput, match="solver='euler' alone"):
        lifted(x)
    # Twice the steps are blocks of half the scale, each with its ReLU.
    run, flow = runs_of(net)[2], flows(lifted)[2]
    h = torch.rand(2, 16, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = h
        for i in range(4):
            mean, var = ([n.statistics(i / 4)[j] for n in norms(flow)] for j in (0, 1))
            branch = copy.deepcopy(run[i // 2].branch)
            for norm, m, v in zip(norms(branch), mean, var, strict=True):
                norm.running_mean, norm.running_var = m, v
            expected = torch.relu(expected + 0.5 * evaluate(branch, 0.0, expected))
        with solver_settings(lifted, steps=4):
            assert off(flow(h), expected) < 1e-12


# Other modules


def test_sequences_of_blocks_are_lifted_wherever_they_stand():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), run_of([Branch(4, kind="mlp") for _ in range(3)]), nn.Tanh())
            self.last = run_of([Branch(4, kind="mlp") for _ in range(2)])

        def forward(self, x):
            return self.last(self.body(x)) - x

    net, x = seasoned(Own()), points()
    lifted = lift(net)
    assert [flow.steps for flow in flows(lifted)] == [3, 2]
    with torch.no_grad():
        assert off(lifted(x), net(x)) < 1e-12


def test_what_stands_between_blocks_ends_their_run():
    branches = [Branch(4, kind="mlp") for _ in range(5)]
    net = seasoned(run_of(branches, t=lambda i, count: 0.0))
    net.insert(2, nn.Linear(4, 4).double())
    lifted, x = lift(net), points()
    assert [type(module) for module in lifted] == [ODEBlock, nn.Linear, ODEBlock]
    assert [flow.steps for flow in flows(lifted)] == [2, 3]
    with torch.no_grad():
        assert off(lifted(x), net(x)) < 1e-12


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("times", ["l/L", "2l/L + 1", "0.3"])
def test_branches_of_the_users_are_lifted_at_the_times_of_their_blocks(times, tied, basis):
    at = {"l/L": lambda i, n: i / n, "2l/L + 1": lambda i, n: 1 + 2 * i / n, "0.3": lambda i, n: 0.3}[times]
    waves = [Wave(seed=0)] * 4 if tied else [Wave(seed=s) for s in range(4)]
    net, x = run_of(waves, at, scale="1/L"), points()
    lifted = lift(net, basis)
    (flow,) = lifted
    assert (flow.t0, flow.t1) == ((1.0, 3.0) if times.startswith("2l") else (0.0, 1.0))
    assert off(lifted(x), net(x)) < 1e-12
    kinds_of = [type(module) for module in flow.modules()]
    assert (Varying in kinds_of) != tied
    assert (Held in kinds_of) == (times == "0.3")
    held = [parameter.shape[0] for parameter in flow.parameters()]
    assert held == ([4, 4] if tied or basis == "constant" else [5, 5])


class Deep(nn.Module):
    """A branch that is a residual net itself."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = run_of([Wave(seed=seed), Wave(seed=seed + 1)], scale=0.5)

    def forward(self, t, h):
        return self.inner(h) - h


@pytest.mark.parametrize("tied", [False, True])
def test_residual_blocks_within_a_branch_are_none_of_the_nets_depth(tied):
    net, x = run_of([Deep()] * 3 if tied else [Deep(s) for s in range(3)], scale=0.5), points()
    lifted = lift(net)
    assert len(flows(lifted)) == 1
    assert len(blocks(lifted)) == 2
    assert off(lifted(x), net(x)) < 1e-12
    with pytest.raises(InvalidInput, match="it is continuous already"):
        lift(lifted)


def test_one_block_in_every_place_is_one_field():
    block = ResidualBlock(Wave(), scale=0.2, t=0.5)
    net, x = nn.Sequential(*[block] * 5), points()
    (flow,) = lifted = lift(net)
    assert off(lifted(x), net(x)) < 1e-12
    assert flow.breakpoints == ()
    # dh/dt = 5·0.2·f(0.5, h), whatever t.
    with torch.no_grad():
        torch.testing.assert_close(flow.branch(0.1, x), block.branch(0.5, x))


def test_fixed_scales_that_differ_are_values_of_one_that_is_not_trained():
    net, x = run_of([Wave(seed=s) for s in range(3)]), points()
    for block, scale in zip(net, (0.1, -0.4, 0.7), strict=True):
        block.scale = scale
    for basis in BASES:
        lifted = lift(net, basis)
        assert off(lifted(x), net(x)) < 1e-12
        weight = lifted[0].branch.gain[0].weight
        assert not weight.requires_grad
        assert weight.tolist() == [0.1, -0.4, 0.7, 0.7][: len(weight)]


def test_branches_that_vary_with_time_themselves_are_lifted_as_they_are_at_their_blocks():
    varying = [Branch(4, kind="mlp", time="linear", knots=3) for _ in range(3)]
    net, x = seasoned(run_of(varying)), points()
    for basis in BASES:
        with torch.no_grad():
            assert off(lift(net, basis)(x), net(x)) < 1e-12


@pytest.mark.parametrize(
    ("knots", "at"), [(3, lambda i, n: i / n), (4, lambda i, n: 2 * i / n)], ids=["bends between", "another span"]
)
def test_a_shared_branch_that_no_grid_of_its_blocks_has_is_taken_by_its_values_there(knots, at):
    net, x = seasoned(run_of([Branch(4, kind="mlp", time="linear", knots=knots)] * 3, at)), points()
    (flow,) = lifted = lift(net)
    with torch.no_grad():
        assert off(lifted(x), net(x)) < 1e-12
    assert (flow.branch.branch.layers.basis.kind, flow.branch.branch.layers.basis.knots) == ("constant", 3)


def test_modes_are_kept():
    for mode in (True, False):
        lifted = lift(net_of(scale="skipinit", kind="basic").train(mode))
        assert {module.training for module in lifted.modules()} == {mode}


# Refusals


class Strange(nn.Module):
    """A residual block that is none of ours."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, h):
        return h + self.layer(h)


class Doubled(ResidualBlock):
    """A residual block that computes something else."""

    def forward(self, h):
        return super().forward(2 * h)


def hidden():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(run_of([Branch(4, kind="mlp")] * 2))

    return Hidden()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build(NetConfig(net="plain", depth=8, width=4)), "Net cannot be lifted: its layers have no shortcut"),
        (lambda: build(NetConfig(net="vgg", blocks=2, convs=1)), "its layers have no shortcut"),
        (lambda: build(NetConfig(net="odenet", width=4)), "it is continuous already"),
        (lambda: nn.Sequential(Strange(), Strange()), "no residual block of ours"),
        (lambda: torchvision.models.resnet18(), "ResNet cannot be lifted: it holds no residual block of ours"),
        (lambda: nn.Sequential(*(Doubled(Wave()) for _ in range(2))), "no residual block of ours"),
        (hidden, "blocks.0 stands in no nn.Sequential"),
    ],
)
def test_what_has_no_steps_of_a_flow_is_refused(make, says):
    with pytest.raises(InvalidInput, match=says):
        lift(make())


def mlp(**settings):
    return Branch(4, kind="mlp", **settings)


def with_buffer(value):
    wave = Wave()
    wave.register_buffer("shift", torch.tensor(value))
    return wave


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: run_of([mlp(), mlp(expansion=2)]), r"blocks 1 and 2 of a run .* differ in"),
        (lambda: run_of([mlp(), mlp(), Wave()]), "blocks 1 and 3 of a run are no values of one field"),
        (lambda: run_of([mlp(stack=Stack(activation=a)) for a in ("relu", "elu")]), "differ in class"),
        (lambda: run_of([with_buffer(1.0), with_buffer(2.0)]), "the buffer shift, which is no parameter"),
        (lambda: run_of([mlp() for _ in range(3)], lambda i, n: i * i), "blocks at times 0, 1, 4: evenly spaced"),
        (lambda: run_of([mlp() for _ in range(2)], lambda i, n: -i), "blocks at times 0, -1"),
        (lambda: run_of([mlp()], post=nn.ReLU()).append(ResidualBlock(mlp(), t=0.5)), "what follows the addition"),
        (lambda: nn.Sequential(*(ResidualBlock(mlp(), post=nn.PReLU()) for _ in range(2))), "parameters of its own"),
        (lambda: run_of([mlp()], scale="skipinit").append(ResidualBlock(mlp(), t=0.5)), "scale that is learned"),
        (lambda: run_of([nn.Sequential(nn.Dropout(0.1))] * 2), "torch's Dropout"),
    ],
)
def test_blocks_that_do_not_make_one_field_are_refused(make, says):
    with pytest.raises(InvalidInput, match=says):
        lift(make())


def test_dropout_that_scales_in_evaluation_must_be_the_same_in_every_block():
    stack = Stack(dropout=Dropout(p=0.3, schedule="linear", inverted=False))
    with pytest.raises(InvalidInput, match="not inverted"):
        lift(net_of(stack=stack))
    net, x = net_of(stack=Stack(dropout=Dropout(p=0.3, inverted=False))), images()
    with torch.no_grad():
        assert off(lift(net)(x), net(x)) < 1e-12


def test_other_bases_are_refused():
    for basis in ("fourier", "cubic"):
        with pytest.raises(InvalidInput, match=r"unknown basis to lift weights on.*constant, linear"):
            lift(net_of(), basis)


def test_a_lifted_net_is_read_copied_and_saved_like_any_other():
    net, x = net_of(scale="skipinit"), images()
    lifted = lift(net, "linear")
    assert kinds(lifted) == [[ODEBlock], [ResidualBlock, ODEBlock], [ResidualBlock, ODEBlock]]
    assert len([step for step in dynamics(lifted, x).steps if step.end is not None]) == 7
    other = lift(net_of(scale="skipinit", seed=1), "linear")
    other.load_state_dict(lifted.state_dict())
    with torch.no_grad():
        for each in (other, copy.deepcopy(lifted)):
            assert torch.equal(each(x), lifted(x))
