"""Plain, residual and ODE nets: He's counts, stages, transitions, time, sharing, dropout over the depth."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack
from resode.blocks import GRADIENTS, Branch, PadShortcut, ProjectionShortcut
from resode.data import load
from resode.layers import BASES, NORMS, BatchNorm, Conv2d, FiLM
from resode.nets import PlainLayer, build, odenet, parameter_count, plain, resnet

KINDS = ("basic", "preact", "bottleneck", "convnext")
POINTS = {"size": None, "kind": "mlp", "channels": 3, "classes": 2}


def small(net="resnet", seed=0, **settings):
    defaults = {"depth": 14, "width": 4, "steps": 2, "channels": 2, "size": (8, 8), "classes": 3}
    return build(NetConfig(net=net, **{**defaults, **settings}), seed)


def of_kind(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def same(net, other):
    """Whether two nets have the same parameters and buffers, bit by bit."""
    one, two = net.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def states(net, x):
    """The shapes after the stem and each stage."""
    shapes = []
    for module in (net.stem, *net.stages):
        module.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    net.eval()(x)
    return shapes


# He et al. 2016: counts


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_residual_and_plain_nets_have_the_parameters_of_the_paper(depth, parameters):
    with torch.device("meta"):
        assert parameter_count(resnet(depth)) == parameters
        # A zero-padded shortcut has no parameters: with and without shortcuts is a fair comparison.
        assert parameter_count(plain(depth)) == parameters


@pytest.mark.parametrize("net", ["resnet", "plain"])
@pytest.mark.parametrize("kind", ["basic", "preact"])
@pytest.mark.parametrize("depth", [8, 20, 26])
def test_depth_counts_the_layers_with_weights(net, kind, depth):
    layers = of_kind(small(net, depth=depth, kind=kind), nn.Conv2d | nn.Linear)
    assert len(layers) == depth


def test_projections_add_their_own_parameters_and_nothing_else():
    pad, projection = (resnet(20, shortcut=kind) for kind in ("pad", "projection"))
    assert parameter_count(projection) - parameter_count(pad) == 16 * 32 + 32 * 64 + 2 * (32 + 64)


@pytest.mark.parametrize("kind", ["basic", "preact"])
def test_an_ode_net_has_the_parameters_of_three_blocks_two_transitions_and_the_ends(kind):
    w = 16

    def branch(c, o, norms, time=0):
        return 9 * ((c + time) * o + (o + time) * o) + 2 * sum(norms)

    norms = {"basic": lambda c, o: (o, o), "preact": lambda c, o: (c, o)}[kind]
    flows = sum(branch(c, c, norms(c, c)) + 2 * 9 * c for c in (w, 2 * w, 4 * w))
    transitions = sum(branch(c, 2 * c, norms(c, 2 * c)) for c in (w, 2 * w))
    stem = 9 * 3 * w + (2 * w if kind == "basic" else 0)
    head = 2 * 4 * w + 4 * w * 10 + 10
    assert parameter_count(odenet(kind=kind)) == stem + flows + transitions + head


# Stages


@pytest.mark.parametrize("net", ["resnet", "plain", "odenet"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (13, 6)])
def test_stages_halve_the_image_and_double_the_channels(net, kind, size):
    (H, W), w = size, 4
    half, quarter = (-(-H // 2), -(-W // 2)), (-(-H // 4), -(-W // 4))
    expected = [(w, H, W), (w, H, W), (2 * w, *half), (4 * w, *quarter)]
    assert states(small(net, kind=kind, size=size), torch.rand(2, 2, *size)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_net_has_n_blocks_a_stage_and_the_first_of_two_stages_change_the_shape(kind):
    net = small(depth=20, kind=kind)
    assert [[type(block) for block in stage] for stage in net.stages] == [[ResidualBlock] * 3] * 3
    changing = [[not isinstance(block.shortcut, nn.Identity) for block in stage] for stage in net.stages]
    assert changing == [[False, False, False], [True, False, False], [True, False, False]]


@pytest.mark.parametrize(("shortcut", "kind"), [("pad", PadShortcut), ("projection", ProjectionShortcut)])
def test_transitions_have_the_shortcut_asked_for(shortcut, kind):
    for net in ("resnet", "odenet"):
        for stage in small(net, shortcut=shortcut).stages[1:]:
            assert isinstance(stage[0].shortcut, kind)


def test_a_plain_net_is_the_residual_net_without_its_shortcuts():
    net = small("plain", depth=20)
    assert [[type(layer) for layer in stage] for stage in net.stages] == [[PlainLayer] * 6] * 3
    strides = [[layer.layers[0].stride[0] for layer in stage] for stage in net.stages]
    assert strides == [[1] * 6, [2, *[1] * 5], [2, *[1] * 5]]
    assert len(of_kind(net, ResidualBlock)) == 0


def test_an_ode_net_has_the_transitions_of_the_residual_net_and_one_ode_block_a_stage():
    ode, res = small("odenet"), small("resnet")
    kinds = [[type(module) for module in stage] for stage in ode.stages]
    assert kinds == [[ODEBlock], [ResidualBlock, ODEBlock], [ResidualBlock, ODEBlock]]
    for a, b in zip(ode.stages[1:], res.stages[1:], strict=True):
        assert str(a[0]) == str(b[0])


@pytest.mark.parametrize("net", ["resnet", "odenet"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_stands_after_the_addition_or_before_the_branch(net, kind):
    model = small(net, kind=kind)
    post = nn.ReLU if kind in ("basic", "bottleneck") else nn.Identity
    assert {type(block.post) for block in of_kind(model, ResidualBlock)} == {post}
    # What enters the head's average has passed a norm and an activation, once.
    activated = post is nn.ReLU and net == "resnet"
    ends = [type(layer) for layer in model.head]
    assert ends[: -len(ends) + 2] == ([nn.AdaptiveAvgPool2d, nn.Flatten] if activated else [BatchNorm, nn.ReLU])
    assert (len(of_kind(model.stem, nn.ReLU)) == 1) == (post is nn.ReLU)


def test_the_smallest_residual_net_has_one_block_a_stage():
    net = small(depth=8, scale="1/L", tied=True)
    assert [len(stage) for stage in net.stages] == [1, 1, 1]
    assert net(torch.rand(2, 2, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("net", ["resnet", "plain", "odenet"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("size", [(7, 5), (9, 12)])
def test_elementwise_layer_norm_is_made_for_the_sizes_it_meets(net, kind, shortcut, size):
    stack = Stack(norm="layer", norm_affine="elementwise")
    model = small(net, kind=kind, shortcut=shortcut, size=size, stack=stack, depth=8)
    assert model(torch.rand(2, 2, *size)).shape == (2, 3)
    assert any(p.shape[1:] == (-(-size[0] // 4), -(-size[1] // 4)) for p in model.parameters() if p.ndim == 3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", ["resnet", "plain", "odenet"])
def test_each_net_runs_with_each_norm(net, norm):
    model = small(net, stack=Stack(norm=norm, conv="weight-standardized", activation="gelu"), depth=8)
    logits = model(torch.rand(4, 2, 8, 8))
    assert logits.shape == (4, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("net", ["resnet", "odenet", "plain"])
def test_instance_norm_says_when_one_pixel_is_left(net):
    with pytest.raises(InvalidInput, match="instance norm averages over the pixels"):
        small(net, size=(4, 4), stack=Stack(norm="instance"))(torch.rand(2, 2, 4, 4))


def test_expansion_is_the_width_inside_a_branch():
    branch = small(kind="bottleneck", expansion=0.5, width=8).stages[0][0].branch
    assert [layer.out_channels for layer in of_kind(branch, Conv2d)] == [4, 4, 8]


# Points


@pytest.mark.parametrize("net", ["resnet", "plain", "odenet"])
def test_a_net_on_points_has_one_stage_whose_state_is_the_point(net):
    model = small(net, depth=20, **POINTS)
    assert states(model, torch.rand(5, 3)) == [(3,), (3,)]
    assert isinstance(model.stem, nn.Identity)
    assert (model.head.in_features, model.head.out_features) == (3, 2)
    assert model(torch.rand(5, 3)).shape == (5, 2)
    # 3n blocks of two layers, of which the plain net has each by itself.
    assert [len(stage) for stage in model.stages] == [{"resnet": 9, "plain": 18, "odenet": 1}[net]]


def test_blocks_on_points_keep_the_shape():
    assert all(isinstance(block.shortcut, nn.Identity) for block in small(**POINTS).stages[0])


def test_instance_norm_on_points_is_refused():
    for net in ("plain", "resnet", "odenet"):
        with pytest.raises(InvalidInput, match="instance norm needs images"):
            small(net, stack=Stack(norm="instance"), **POINTS)


# ODE blocks


def test_each_stage_has_its_own_number_of_steps():
    net = small("odenet", steps=(1, 2, 3))
    assert [block.steps for block in of_kind(net, ODEBlock)] == [1, 2, 3]
    net(torch.rand(2, 2, 8, 8))
    assert [block.stats.accepted for block in of_kind(net, ODEBlock)] == [1, 2, 3]
    assert [block.steps for block in of_kind(small("odenet", steps=5), ODEBlock)] == [5, 5, 5]


SOLVE = {
    "solver": "bosh3",
    "steps": None,
    "rtol": 1e-2,
    "atol": 1e-4,
    "max_steps": 50,
    "gradient": "adjoint",
    "mask_intervals": 2,
    "extra_channels": 1,
    "kinetic": 0.1,
    "jacobian": 0.2,
    "steer": 0.3,
}


def test_the_settings_of_a_solve_reach_every_block():
    for block in of_kind(small("odenet", compile=True, **SOLVE), ODEBlock):
        assert {name: getattr(block, name) for name in SOLVE} == SOLVE
        assert block.compile_mode == "default"
    assert {block.compile_mode for block in of_kind(small("odenet"), ODEBlock)} == {None}


def test_without_a_number_of_steps_embedded_pairs_choose_theirs_and_the_others_make_eight():
    x = torch.rand(2, 2, 8, 8)
    for solver, grid in (("rk4", 8), ("explicit_adams", 8), ("dopri5", None)):
        net = small("odenet", solver=solver, steps=None)
        assert {block.grid_steps for block in of_kind(net, ODEBlock)} == {grid}
        net(x)
    assert {block.grid_steps for block in of_kind(small("odenet", solver="dopri5", steps=3), ODEBlock)} == {3}


@pytest.mark.parametrize("shape", [{}, POINTS])
def test_extra_channels_live_in_the_flow_alone(shape):
    net, plain = small("odenet", extra_channels=3, **shape), small("odenet", **shape)
    x = torch.rand(2, 3) if shape else torch.rand(2, 2, 8, 8)
    assert states(net, x) == states(plain, x)
    for block, other in zip(of_kind(net, ODEBlock), of_kind(plain, ODEBlock), strict=True):
        assert block.branch.channels == other.branch.channels + 3


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_ode_net_learns_digits_with_every_gradient_mode(gradient):
    data = load("digits")
    x, labels = data.standardize(data.train.inputs[:64]), data.train.labels[:64]
    net = small("odenet", channels=1, classes=10, solver="midpoint", gradient=gradient)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(8):
        losses.append(nn.functional.cross_entropy(net(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_depth_means_nothing_to_an_ode_net():
    stack = Stack(dropout=Dropout(p=0.5, schedule="linear"))
    nets = [small("odenet", depth=depth, stack=stack) for depth in (1, 8, 50)]
    assert len({str(net) for net in nets}) == 1
    assert same(nets[0], nets[1])
    assert same(nets[0], nets[2])


@pytest.mark.parametrize("time", ["none", "concat", "film"])
def test_time_reaches_flows_and_tied_branches_alone(time):
    def timed(branch):
        return {
            "concat": any(layer.time_weight is not None for layer in of_kind(branch, Conv2d)),
            "film": any(isinstance(layer, FiLM) for layer in branch.modules()),
        }

    asked = {"concat": time == "concat", "film": time == "film"}
    never = {"concat": False, "film": False}
    for net in (small("odenet", time=time), small(tied=True, time=time)):
        for stage in net.stages:
            for module in stage:
                keeps = isinstance(module, ODEBlock) or isinstance(module.shortcut, nn.Identity)
                assert timed(module.branch) == (asked if keeps else never)
    # Blocks with weights of their own know their place without being told the time.
    assert all(timed(block.branch) == never for block in of_kind(small(time=time), ResidualBlock))


# Weights that vary with t


def knots(net):
    return [block.branch.layers.basis.knots for block in of_kind(net, ODEBlock)]


def test_by_default_there_is_a_piece_a_step_or_a_block():
    steps = {"solver": "euler", "steps": (2, 3, 4)}
    assert knots(small("odenet", time="constant", **steps)) == [2, 3, 4]
    assert knots(small("odenet", time="linear", **steps)) == [3, 4, 5]
    assert knots(small("odenet", time="fourier", **steps)) == [2, 3, 4]
    assert knots(small("odenet", time="constant", knots=2, steps=4)) == [2, 2, 2]
    for time in BASES:
        tied = small(depth=26, tied=True, time=time)
        assert [stage[-1].branch.layers.basis.knots for stage in tied.stages] == [4, 3, 3]


def test_a_grid_without_the_knots_is_refused():
    with pytest.raises(InvalidInput, match="steps over the breakpoint"):
        small("odenet", time="constant", knots=3, steps=4)


@pytest.mark.parametrize("kind", ["preact", "convnext"])
def test_a_flow_with_a_piece_a_block_has_the_parameters_of_the_residual_net(kind):
    shared = {"depth": 26, "kind": kind}
    untied = parameter_count(small(**shared))
    assert parameter_count(small(tied=True, time="constant", **shared)) == untied
    assert parameter_count(small("odenet", time="constant", solver="euler", steps=(4, 3, 3), **shared)) == untied
    points = {"depth": 14, **POINTS}
    assert parameter_count(small("odenet", time="constant", steps=6, **points)) == parameter_count(small(**points))


@pytest.mark.parametrize("kind", ["basic", "preact"])
def test_the_tied_net_with_a_piece_a_block_is_the_untied_net(kind):
    shared = {"depth": 26, "kind": kind, "scale": "1/L"}
    untied, tied = small(**shared).double(), small(tied=True, time="constant", **shared).double()
    with torch.no_grad():
        for stage, other in zip(tied.stages, untied.stages, strict=True):
            first = int(stage is not tied.stages[0])  # of 4, 1 + 3 and 1 + 3 blocks
            for k, block in enumerate(list(other)[first:]):
                for stacked, own in zip(stage[first].branch.parameters(), block.branch.parameters(), strict=True):
                    stacked[k] = own
            if first:
                stage[0].load_state_dict(other[0].state_dict())
    tied.stem.load_state_dict(untied.stem.state_dict())
    tied.head.load_state_dict(untied.head.state_dict())
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(tied.train(training)(x), untied.train(training)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", BASES)
def test_nets_with_weights_that_vary_run_and_are_trained(kind, time):
    for net in (small("odenet", kind=kind, time=time), small(kind=kind, tied=True, time=time)):
        net(torch.rand(4, 2, 8, 8)).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


# Residual blocks: times, scales, shared weights


@pytest.mark.parametrize("tied", [False, True])
def test_the_blocks_of_a_stage_stand_at_equal_times(tied):
    net = small(depth=26, tied=tied)
    assert [block.t for block in net.stages[0]] == [0.0, 0.25, 0.5, 0.75]
    assert [block.t for block in net.stages[1]] == [0.0, 0.0, 1 / 3, 2 / 3]


@pytest.mark.parametrize(
    ("scale", "values"), [("1/L", (1 / 4, 1 / 3)), ("1/sqrt(L)", (1 / 2, 3**-0.5)), (0.3, (0.3, 0.3))]
)
def test_scales_are_those_of_the_blocks_that_keep_the_shape(scale, values):
    net = small(depth=26, scale=scale)
    assert [block.scale for block in net.stages[0]] == pytest.approx([values[0]] * 4)
    for stage in net.stages[1:]:
        assert [block.scale for block in stage] == pytest.approx([1.0, *[values[1]] * 3])


@pytest.mark.parametrize("tied", [False, True])
def test_skipinit_makes_every_stage_its_shortcuts_at_the_start(tied):
    net = small(depth=20, kind="preact", scale="skipinit", tied=tied)
    scales = [block.scale for block in net.stages[0]]
    assert len({id(scale) for scale in scales}) == 3
    assert all(isinstance(scale, nn.Parameter) and scale == 0.0 for scale in scales)
    h = torch.rand(2, 4, 8, 8)
    assert torch.equal(net.stages[0](h), h)


def test_tied_blocks_share_their_weights_for_good():
    net, untied = small(depth=26, tied=True), small(depth=26)
    for stage, first in zip(net.stages, (0, 1, 1), strict=True):
        assert len({id(block.branch) for block in list(stage)[first:]}) == 1
    assert len({id(block.branch) for block in untied.stages[0]}) == 4
    # A deeper tied net has no more parameters.
    assert parameter_count(small(depth=38, tied=True)) == parameter_count(net) < parameter_count(untied)
    # Training the one is training all: the gradient is the sum over the untied copies' gradients.
    net = small(depth=20, kind="preact", tied=True, time="none", stack=Stack(norm="none"))
    copies = small(depth=20, kind="preact", stack=Stack(norm="none"))
    held = net.state_dict()
    copies.load_state_dict({name: held[name] for name in copies.state_dict()})
    x = torch.rand(2, 2, 8, 8)
    for model in (net, copies):
        model(x).square().sum().backward()
    first, *others = (block.branch for block in copies.stages[0])
    for name, parameter in net.stages[0][0].branch.named_parameters():
        total = sum(branch.get_parameter(name).grad for branch in (first, *others))
        torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-5)


def test_tied_batch_norm_keeps_statistics_at_each_time():
    net = small(depth=20, tied=True)
    assert {layer.knots for layer in of_kind(net.stages[0], BatchNorm)} == {(0.0, 1 / 3, 2 / 3)}
    net(torch.rand(16, 2, 8, 8))
    means = of_kind(net.stages[0], BatchNorm)[0].running_mean
    assert all(not torch.allclose(a, b) for a, b in pairwise(means))


# Dropout


def rates(net, at):
    return [at(module) for module in net.modules() if isinstance(module, Branch)]


def dropped(kind):
    """The probability with which a branch drops, by the kind of dropout."""

    def at(branch):
        if kind == "dropconnect":
            (p,) = {layer.dropconnect for layer in of_kind(branch, Conv2d)}
            return p
        (layer,) = [layer for layer in branch.modules() if getattr(layer, "kind", None) == kind]
        return layer.p

    return at


@pytest.mark.parametrize("kind", ["unit", "spatial", "cutout", "path", "dropconnect"])
def test_linear_dropout_rises_in_equal_parts_block_by_block(kind):
    stack = Stack(dropout=Dropout(kind, 0.5, "linear"))
    found = rates(small(depth=20, stack=stack), dropped(kind))
    assert found == pytest.approx([0.5 * i / 9 for i in range(1, 10)])
    assert found[-1] == 0.5


@pytest.mark.parametrize("kind", ["unit", "path", "dropconnect"])
def test_linear_dropout_of_an_ode_net_is_that_of_a_residual_net_of_many_blocks_averaged_by_stage(kind):
    stack = Stack(dropout=Dropout(kind, 0.6, "linear"))
    found = rates(small("odenet", stack=stack), dropped(kind))
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    many = rates(small(depth=6 * 300 + 2, width=1, stack=stack), dropped(kind))
    flows = [sum(many[first : first + 299]) / 299 for first in (0, 301, 601)]
    transitions = [many[300], many[600]]
    expected = [flows[0], transitions[0], flows[1], transitions[1], flows[2]]
    assert found == pytest.approx(expected, abs=2e-3)


def test_linear_dropout_of_a_plain_net_rises_layer_by_layer():
    net = small("plain", depth=20, stack=Stack(dropout=Dropout(p=0.5, schedule="linear")))
    found = [layer.layers[-1].p for layer in of_kind(net, PlainLayer)]
    assert found == pytest.approx([0.5 * i / 18 for i in range(1, 19)])


def test_tied_blocks_drop_alike():
    net = small(depth=20, tied=True, stack=Stack(dropout=Dropout(p=0.6, schedule="linear")))
    assert [dropped("unit")(block.branch) for block in net.stages[0]] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("net", ["resnet", "odenet", "plain"])
@pytest.mark.parametrize("kind", ["unit", "dropconnect"])
def test_nothing_is_dropped_in_stem_shortcuts_and_head(net, kind):
    model = small(net, shortcut="projection", stack=Stack(dropout=Dropout(kind, 0.5)))
    within = {id(part) for branch in of_kind(model, Branch | PlainLayer) for part in branch.modules()}
    for module in model.modules():
        if id(module) not in within:
            assert getattr(module, "p", 0.0) == 0.0
            assert getattr(module, "dropconnect", 0.0) == 0.0


# Building


def test_convolutions_start_he_normal_grouped_ones_too():
    """Var w = 2/(k²·C_out/groups): for a depthwise 7×7 convolution 2/49."""
    for layer in of_kind(small(kind="convnext", width=64, depth=8), Conv2d):
        fan_out = layer.kernel_size[0] ** 2 * layer.out_channels / layer.groups
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("time", "drawn"), [("constant", 4), ("linear", 5), ("fourier", 1)])
def test_each_value_of_a_convolution_that_varies_starts_he_normal(time, drawn):
    net = small("odenet", kind="convnext", width=64, time=time, steps=4)
    for layer in of_kind(nn.ModuleList(of_kind(net, ODEBlock)), Conv2d):
        fan_out = layer.kernel_size[0] ** 2 * layer.out_channels / layer.groups
        values = layer.weight.detach()
        assert not values[drawn:].any()
        assert len({float(value.sum()) for value in values[:drawn]}) == drawn
        for value in values[:drawn]:
            assert float(value.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_a_seed_makes_the_same_net_and_leaves_the_global_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = small(seed=3), small(seed=3), small(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert not same(one, other)


def test_without_a_seed_the_global_random_state_decides():
    torch.manual_seed(3)
    one, two = small(seed=None), small(seed=None)
    assert same(one, small(seed=3))
    assert not same(one, two)


def test_a_failed_build_restores_the_global_random_state():
    before = torch.get_rng_state()
    with pytest.raises(InvalidInput, match="elementwise"):
        small(seed=1, stack=Stack(norm="batch", norm_affine="elementwise"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: resnet(14, kind="preact"), {"net": "resnet", "depth": 14, "kind": "preact"}),
        (lambda: plain(14, Stack(norm="group")), {"net": "plain", "depth": 14, "stack": Stack(norm="group")}),
        (lambda: odenet(solver="euler", steps=2), {"net": "odenet", "solver": "euler", "steps": 2}),
    ],
)
def test_the_named_nets_are_builds_of_a_config(make, settings):
    torch.manual_seed(0)
    assert same(make(), build(NetConfig(**settings), seed=0))
