"""Refined and coarsened nets: the same field at other depths, and an optimizer that goes on."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from depth_nets import Wave, blocks, flows, images, net_of, off, points, run_of, seasoned
from torch import nn

from resode import Branch, Dropout, InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack, build, evaluate
from resode.blocks import ProjectedODE
from resode.layers import BatchNorm
from resode.limits import coarsen, coarsen_, lift, refine, refine_

SMOOTH = Stack(norm="none", activation="tanh")
NETS = {
    "residual": {},
    "post-activation SkipInit": {"kind": "basic", "scale": "skipinit"},
    "residual, 1/L, group norm": {"scale": "1/L", "stack": Stack(norm="group")},
    "tied": {"tied": True, "time": "none"},
    "tied, pieces": {"tied": True, "time": "constant", "scale": "skipinit"},
    "ode": {"net": "odenet", "steps": 4, "time": "none"},
    "ode, time channel, euler": {"net": "odenet", "steps": 3, "solver": "euler", "time": "concat"},
    "ode, pieces": {"net": "odenet", "steps": 4, "time": "constant", "knots": 2},
    "ode, knots": {"net": "odenet", "steps": 4, "time": "linear", "knots": 3},
    "ode, fourier": {"net": "odenet", "steps": 4, "time": "fourier", "knots": 3},
    "ode, masks": {"net": "odenet", "steps": 4, "mask_intervals": 2, "stack": Stack(dropout=Dropout(p=0.2))},
}


def structure(net):
    """All that a change of depth changes, besides parameters and buffers."""
    names = ("t", "scale", "steps", "mask_intervals", "knots", "basis")
    held = [{name: getattr(module, name) for name in names if hasattr(module, name)} for module in net.modules()]
    return [{k: float(v.detach()) if isinstance(v, torch.Tensor) else v for k, v in each.items()} for each in held]


# Outputs


def naive(run, h, r):
    """r steps of 1/r of each block of ``run``."""
    for block in run:
        for _ in range(r):
            h = block.post(h + block.scale / r * evaluate(block.branch, block.t, h))
    return h


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("name", ["residual", "post-activation SkipInit", "residual, 1/L, group norm"])
def test_each_block_becomes_r_with_an_rth_of_its_scale(name, r):
    net, h = net_of(**NETS[name]), torch.rand(2, 4, 6, 6, dtype=torch.float64)
    fine = refine(net, r)
    assert len(fine.stages[0]) == 3 * r
    assert [len(stage) for stage in fine.stages[1:]] == [1 + 2 * r] * 2
    assert [block.t for block in fine.stages[0]] == pytest.approx([i / (3 * r) for i in range(3 * r)])
    with torch.no_grad():
        assert off(fine.stages[0](h), naive(net.stages[0], h, r)) < 1e-12
    # The copies are to become different.
    owners = [set(block.parameters()) for block in blocks(fine)]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert not set(net.parameters()) & set(fine.parameters())
    # What changes the shape stays.
    for mine, its in zip(fine.stages, net.stages, strict=True):
        if not isinstance(its[0].shortcut, nn.Identity):
            assert structure(mine[0]) == structure(its[0])


def test_a_shared_branch_stays_shared_at_the_times_in_between():
    net, x = net_of(tied=True, time="concat"), images()
    fine = refine(net)
    run = fine.stages[0]
    assert len(run) == 6
    assert {id(block.branch) for block in run} == {id(run[0].branch)}
    assert [block.t for block in run] == pytest.approx([i / 6 for i in range(6)])
    assert [norm.knots for norm in norms(run)] == [tuple(block.t for block in run)] * 2
    assert sum(p.numel() for p in fine.parameters()) == sum(p.numel() for p in net.parameters())
    # The statistics are the same function of t.
    for mine, its in zip(norms(run), norms(net.stages[0]), strict=True):
        for t in (0.0, 0.1, 1 / 3, 0.4, 0.6, 0.9):
            for seen, expected in zip(mine.statistics(t), its.statistics(t), strict=True):
                torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert off(fine(x), net(x)) < 0.5


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("time", ["constant", "linear", "fourier"])
def test_weights_and_statistics_of_an_ode_block_stay_the_same_functions_of_time(time, r):
    net = net_of("odenet", steps=4, time=time, knots=5 if time == "linear" else 4)
    fine = refine(net, r)
    assert [flow.steps for flow in flows(fine)] == [4 * r] * 3
    knots = {"constant": 4 * r, "linear": 4 * r + 1, "fourier": 4}[time]
    for mine, its in zip(flows(fine), flows(net), strict=True):
        assert mine.branch.layers.basis.knots == knots
        assert len(norms(mine)[0].knots) == 4 * r + 1
        for t in (0.0, 0.05, 0.25, 0.3, 0.5, 0.71, 0.99, 1.0):
            expected = its.branch.layers.parameters_at(t)
            for name, value in mine.branch.layers.parameters_at(t).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
            for a, b in zip(norms(mine), norms(its), strict=True):
                for seen, wanted in zip(a.statistics(t), b.statistics(t), strict=True):
                    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)


def differences(net, x, times):
    """How far each of some refinements of ``net`` is from the one before it."""
    found = []
    with torch.no_grad():
        for _ in range(times):
            fine = refine(net)
            found.append(off(fine(x), net(x)))
            net = fine
    return found


def order(errors):
    """The slope of the logarithm, where rounding does not show."""
    errors = [e for e in errors if e > 1e-12]
    assert len(errors) > 2
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


def mlp(time="none", **settings):
    return Branch(4, SMOOTH, "mlp", time, **settings)


FLOWS = {
    "none": lambda: mlp(),
    "concat": lambda: mlp("concat"),
    "constant": lambda: mlp("constant", knots=2),
    "linear": lambda: mlp("linear", knots=3),
    "fourier": lambda: mlp("fourier", knots=3),
}


@pytest.mark.parametrize(("solver", "expected", "times"), [("euler", 1, 6), ("midpoint", 2, 5), ("rk4", 4, 4)])
@pytest.mark.parametrize("time", FLOWS)
def test_refining_an_ode_net_changes_its_outputs_at_the_order_of_its_solver(time, solver, expected, times):
    torch.manual_seed(0)
    net = seasoned(nn.Sequential(ODEBlock(FLOWS[time](), solver, 8)))
    assert order(differences(net, points(), times)) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", ["tied", "tied, time channel", "each its own"])
def test_refining_a_residual_net_changes_its_outputs_at_order_1(name):
    torch.manual_seed(0)
    made = [mlp("concat" if "time" in name else "none") for _ in range(8)]
    net = seasoned(run_of(made if name == "each its own" else [made[0]] * 8, scale="1/L"))
    assert order(differences(net, points(), 6)) == pytest.approx(1, abs=0.1)


def test_lifting_and_refining_commute():
    for stack in (SMOOTH, Stack(norm="group")):
        net, x = net_of(stack=stack, scale="skipinit"), images()
        one, other = lift(refine(net)), refine(lift(net))
        assert all(same(a, b) for a, b in zip(structure(one), structure(other), strict=True))
        with torch.no_grad():
            assert off(one(x), other(x)) < 1e-12


def test_projected_dynamics_are_refined_like_others():
    torch.manual_seed(0)
    net = seasoned(nn.Sequential(ProjectedODE(mlp("concat"), nn.ReLU(), 8)))
    errors = differences(net, points().abs(), 6)
    assert order(errors) == pytest.approx(1, abs=0.4)


def test_mask_intervals_are_cut_where_there_are_several():
    fine = refine(net_of(**NETS["ode, masks"]), 3)
    assert {(flow.mask_intervals, flow.steps) for flow in flows(fine)} == {(6, 12)}
    assert {flow.mask_intervals for flow in flows(refine(net_of(**NETS["ode"]), 3))} == {1}
    fine.train()(images())


# There and back


def optimizers(net):
    return [
        torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
        torch.optim.Adam(net.parameters(), lr=0.001, amsgrad=True),
        torch.optim.AdamW(net.parameters(), lr=0.001),
    ]


def train(net, optimizer, steps=2, seed=7):
    x, labels = images(8, seed), torch.arange(8) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def same(one, other, rtol=0.0):
    """Whether two dicts (of dicts) of tensors are the same, to the last bit if ``rtol`` is 0."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=0)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], rtol) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b, rtol) for a, b in zip(one, other, strict=True))
    return one == pytest.approx(other, rel=1e-14) if isinstance(one, float) else one == other


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("name", NETS)
def test_coarsening_what_was_refined_gives_the_net_again(name, r):
    net, x = net_of(**NETS[name]), images()
    again = coarsen(refine(net, r), r)
    assert all(same(a, b) for a, b in zip(structure(net), structure(again), strict=True))
    assert same(net.state_dict(), again.state_dict(), 0.0 if r == 2 else 1e-14)
    with torch.no_grad():
        assert off(again(x), net(x)) < 1e-12


@pytest.mark.parametrize("which", range(3), ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", NETS)
def test_and_with_it_all_that_the_optimizer_remembers(name, which):
    net = net_of(**NETS[name]).train()
    optimizer = optimizers(net)[which]
    train(net, optimizer)
    held = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for r in (2, 3):
        refine_(net, r, optimizer)
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(list(net.parameters()))
        assert set(group["params"]) == set(net.parameters()) == set(optimizer.state)
        assert all(optimizer.state[p].keys() == next(iter(optimizer.state.values())).keys() for p in net.parameters())
        coarsen_(net, r, optimizer)
        assert same(held[0], net.state_dict(), 0.0 if r == 2 else 1e-14)
        assert same(held[1], optimizer.state_dict(), 0.0 if r == 2 else 1e-13)


def test_a_lifted_net_is_coarsened_again():
    net = lift(net_of(scale="skipinit", kind="basic"), "linear")
    again = coarsen(refine(net))
    assert same(net.state_dict(), again.state_dict())
    assert all(same(a, b) for a, b in zip(structure(net), structure(again), strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_what_stands_within_a_branch_stays(shared):
    class Deep(nn.Module):
        """A branch that has steps of its own, of both kinds."""

        def __init__(self, seed):
            super().__init__()
            self.inner = nn.Sequential(run_of([Wave(seed=seed)] * 2, scale=0.5), ODEBlock(Wave(seed=seed), "euler", 3))

        def forward(self, t, h):
            return self.inner(h) - h

    one = Deep(0)
    net, h = run_of([one, one] if shared else [one, Deep(1)], scale=0.5), points()
    fine = refine(net)
    assert len(fine) == 4
    assert [(len(block.branch.inner[0]), block.branch.inner[1].steps) for block in fine] == [(2, 3)] * 4
    with torch.no_grad():
        assert off(fine(h), naive(net, h, 2)) < 1e-12
        assert off(coarsen(fine)(h), net(h)) < 1e-12


# What the optimizer remembers


def remembered(make, depth):
    """How far the momentum carried over is from the gradient of the finer net, relative to it, by kind of parameter."""
    net, x = make(depth), points(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    for refined in (False, True):
        if refined:
            refine_(net, 2, optimizer)
        optimizer.zero_grad()
        (net(x) - 1).square().sum().backward()
        if not refined:
            optimizer.step()  # the first momentum is the gradient
    found = {}
    for name, p in net.named_parameters():
        pair = optimizer.state[p]["momentum_buffer"].flatten(), p.grad.flatten()
        found.setdefault(name.rpartition(".")[2], []).append(pair)
    pairs = [tuple(map(torch.cat, zip(*each, strict=True))) for each in found.values()]
    return [float((m - g).norm() / g.norm()) for m, g in pairs]


def residual(L, scale="1/L"):
    """Blocks whose weights are values of a smooth function of t."""
    ends = Wave(seed=0), Wave(seed=1)
    branches = [copy.deepcopy(ends[0]) for _ in range(L)]
    for i, branch in enumerate(branches):
        for p, *its in zip(branch.parameters(), *(end.parameters() for end in ends), strict=True):
            p.data = torch.lerp(its[0].data, its[1].data, i / L)
    net = run_of(branches, scale=scale)
    if scale == "skipinit":
        for i, block in enumerate(net):
            block.scale.data = torch.tensor((1 + i / L) / L, dtype=torch.float64)
    return net


def flow(time, solver):
    def make(L):
        torch.manual_seed(0)
        knots = {"constant": L, "linear": L + 1, "fourier": 3}.get(time)
        branch = seasoned(mlp(time, knots=knots))
        if time in ("constant", "linear"):  # values of a smooth function, here too
            for p in branch.parameters():
                s = torch.linspace(0, 1, knots, dtype=torch.float64).view(-1, *(1 for _ in p.shape[1:]))
                p.data = torch.cos(2 * s + torch.arange(p[0].numel()).view(p.shape[1:]))
        return nn.Sequential(ODEBlock(branch, solver, L))

    return make


CARRIED = {
    "blocks": residual,
    "learned scales": lambda L: residual(L, "skipinit"),
    "shared branch": lambda L: run_of([Wave()] * L, scale="1/L"),
    "ode": flow("none", "euler"),
    "pieces, euler": flow("constant", "euler"),
    "pieces, rk4": flow("constant", "rk4"),
    "knots, rk4": flow("linear", "rk4"),
    "fourier": flow("fourier", "midpoint"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_the_momentum_carried_over_is_that_of_the_finer_net(name):
    """It approaches the gradient that the finer net has, as steps get small, and so falls with the depth."""
    coarse, fine = (remembered(CARRIED[name], depth) for depth in (8, 32))
    assert max(fine) < 0.1
    assert max(fine) < 0.4 * max(coarse)


def test_squares_are_carried_as_squares_of_gradients():
    for name, make in CARRIED.items():
        net, x = make(8), points(8)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.0, 0.0))
        optimizer.zero_grad()
        (net(x) - 1).square().sum().backward()
        optimizer.step()  # with no memory, averages are the gradient and its square
        refine_(net, 2, optimizer)
        for p in net.parameters():
            state = optimizer.state[p]
            assert float(state["step"]) == 1.0
            m, v = state["exp_avg"], state["exp_avg_sq"]
            if name == "knots, rk4":  # between knots a square of a mean is not the mean of squares
                m, v = m[::2], v[::2]
            torch.testing.assert_close(v, m.square(), rtol=1e-12, atol=0, msg=name)


def test_a_count_of_steps_and_settings_of_groups_stay():
    net = net_of().train()
    weights = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}], lr=0.01)
    train(net, optimizer, 3)
    refine_(net, 2, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert len(optimizer.state) == len(list(net.parameters()))
    first, second = optimizer.param_groups
    assert (first["weight_decay"], first["lr"], second["lr"]) == (0.1, 0.01, 0.02)
    assert all(p.ndim > 1 for p in first["params"])
    assert all(p.ndim < 2 for p in second["params"])
    assert set(first["params"]) | set(second["params"]) == set(net.parameters())


@pytest.mark.parametrize(("name", "which"), [(name, i % 3) for i, name in enumerate(NETS)])
def test_training_goes_on_after_a_refinement(name, which):
    net = net_of(**NETS[name]).train()
    optimizer = optimizers(net)[which]
    train(net, optimizer, 2)
    refine_(net, 2, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    losses = [train(net, optimizer, 1) for _ in range(4)]
    assert all(map(math.isfinite, losses))
    moved = [not torch.equal(p.detach(), held) for p, held in zip(net.parameters(), before, strict=True)]
    assert all(moved)


# Coarser nets of trained ones


def test_blocks_that_differ_become_their_mean():
    net = seasoned(run_of([Branch(4, kind="mlp") for _ in range(4)], scale="skipinit"))
    coarse = coarsen(net)
    assert len(coarse) == 2
    pairs = [blocks(net)[i : i + 2] for i in range(0, len(blocks(net)), 2)]
    for mine, (one, other) in zip(blocks(coarse), pairs, strict=True):
        assert mine.t == one.t
        torch.testing.assert_close(mine.scale, one.scale + other.scale)
        for name, p in mine.branch.named_parameters():
            a, b = one.branch.get_parameter(name), other.branch.get_parameter(name)
            torch.testing.assert_close(p, (a + b) / 2)
        for a, b, c in zip(norms(mine), norms(one), norms(other), strict=True):
            torch.testing.assert_close(a.running_mean, (b.running_mean + c.running_mean) / 2)
            torch.testing.assert_close(a.running_var, (b.running_var + c.running_var) / 2)


def test_pieces_become_their_mean_and_knots_stay():
    for time, knots in (("constant", 4), ("linear", 5)):
        net = net_of("odenet", steps=4, time=time, knots=knots)
        coarse = coarsen(net)
        assert {flow.steps for flow in flows(coarse)} == {2}
        for mine, its in zip(flows(coarse), flows(net), strict=True):
            for p, q in zip(mine.parameters(), its.parameters(), strict=True):
                torch.testing.assert_close(p, q[::2] if time == "linear" else (q[::2] + q[1::2]) / 2)
            assert [norm.knots for norm in norms(mine)] == [(0.0, 0.5, 1.0)] * 2
            for a, b in zip(norms(mine), norms(its), strict=True):
                assert torch.equal(a.running_mean, b.running_mean[::2])


# Refusals


def mixed(*others):
    return run_of([Branch(4, kind="mlp"), *others])


def sharing():
    one, other = Wave(seed=0), Wave(seed=1)
    other.weight = one.weight
    return run_of([one, other])


def hidden():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ResidualBlock(Wave())

    return Hidden()


@pytest.mark.parametrize(
    ("change", "make", "says"),
    [
        (refine, lambda: build(NetConfig(net="plain", depth=8, width=4)), "this Net has no depth to change"),
        (coarsen, lambda: nn.Linear(3, 3), "this Linear has no depth to change"),
        (refine, lambda: net_of("odenet", solver="dopri5", steps=None), "dopri5 to a tolerance chooses its steps"),
        (refine, lambda: nn.Sequential(*[ResidualBlock(Wave())] * 2), "stands in several places"),
        (refine, sharing, r"share some of their parameters \(branch.weight, for one\)"),
        (refine, hidden, "block stands in no nn.Sequential"),
        (refine, lambda: ResidualBlock(Wave()), "the residual block given stands in no nn.Sequential"),
        (coarsen, lambda: net_of(), "3 residual blocks of a stage cannot be made 2 times fewer: a multiple of 2"),
        (coarsen, lambda: net_of("odenet", steps=3), "3 steps of an ODE block"),
        (coarsen, lambda: net_of("odenet", steps=6, time="constant", knots=3), "3 pieces of weights that vary"),
        (coarsen, lambda: net_of("odenet", steps=6, time="linear", knots=4), "3 pieces of weights that vary"),
        (coarsen, lambda: net_of("odenet", steps=6, mask_intervals=3), "3 mask intervals"),
        (coarsen, lambda: nn.Sequential(ODEBlock(Branch(4), steps=4, knots=4)), "3 intervals between the knots"),
        (coarsen, lambda: mixed(Branch(4, kind="mlp", expansion=2)), "blocks 1 and 2 of a stage cannot be made one"),
        (coarsen, lambda: mixed(Wave()), "blocks 1 and 2 of a stage cannot be made one"),
    ],
)
def test_what_has_no_such_depth_is_refused_and_left_as_it_was(change, make, says):
    net = make()
    held = copy.deepcopy((structure(net), net.state_dict()))
    with pytest.raises(InvalidInput, match=says):
        change(net)
    with pytest.raises(InvalidInput, match=says):
        (refine_ if change is refine else coarsen_)(net)
    assert structure(net) == held[0]
    assert same(net.state_dict(), held[1])


@pytest.mark.parametrize("factor", [1, 0, -2, 1.5, 2.0, True, "2"])
def test_other_factors_are_refused(factor):
    for change in (refine, coarsen, refine_, coarsen_):
        with pytest.raises(InvalidInput, match=r"factor is .*: a whole number of at least 2"):
            change(net_of(), factor)


def test_an_optimizer_that_remembers_something_else_is_refused_and_nothing_changed():
    class Mine(torch.optim.SGD):
        pass

    for kind in (torch.optim.RMSprop, torch.optim.NAdam, Mine):
        net = net_of().train()
        optimizer = kind(net.parameters(), lr=0.01)
        train(net, optimizer)
        held = copy.deepcopy((structure(net), net.state_dict(), optimizer.state_dict()))
        with pytest.raises(InvalidInput, match=f"what {kind.__name__} remembers.*SGD, Adam, AdamW"):
            refine_(net, 2, optimizer)
        assert structure(net) == held[0]
        assert same(net.state_dict(), held[1])
        assert same(optimizer.state_dict(), held[2])


@pytest.mark.parametrize("change", [refine_, coarsen_])
@pytest.mark.parametrize("name", ["residual", "ode, pieces"])
def test_no_gradient_of_another_shape_or_step_is_left(name, change):
    net = refine(net_of(**NETS[name]), 2)
    net(images()).square().mean().backward()
    change(net, 2)
    block = net.stages[0][0]
    assert all(p.grad is None for p in block.parameters())


def test_what_an_optimizer_never_met_it_need_not_remember():
    """A block without gradients so far has no momentum: that of which it becomes a part begins anew."""
    net = refine(net_of(**NETS["residual"]), 2)
    for p in net.stages[0][1].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(images()).square().mean().backward()
    optimizer.step()
    for p in net.stages[0][1].parameters():
        p.requires_grad_(True)
    coarsen_(net, 2, optimizer)
    first, second = net.stages[0][0], net.stages[0][1]
    assert all(p not in optimizer.state for p in first.parameters())
    assert all(optimizer.state[p]["momentum_buffer"].norm() > 0 for p in second.parameters())
    net(images()).square().mean().backward()
    optimizer.step()
