"""Networks seen as steps: the view is the network, says where each step stands, and refuses what it cannot read."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import resode
from resode import (
    Branch,
    Dropout,
    InvalidInput,
    NetConfig,
    ODEBlock,
    Parts,
    ResidualBlock,
    ResidualDynamics,
    Stack,
    Step,
    build,
    dynamics,
    solver_settings,
)
from resode.blocks import TABLEAUX, PadShortcut
from resode.nets import Net, PlainLayer

BARE = Stack(norm="none", activation="tanh")
NETS = {
    "basic": {"net": "resnet", "depth": 14},
    "preact": {"net": "resnet", "depth": 14, "kind": "preact", "scale": 0.5},
    "tied": {"net": "resnet", "depth": 20, "kind": "preact", "tied": True},
    "plain": {"net": "plain", "depth": 14},
    "vgg": {"net": "vgg", "blocks": 2, "convs": (2, 1)},
    "lenet5": {"net": "lenet5", "size": (12, 12)},
    "odenet": {"net": "odenet", "steps": (2, 1, 3)},
}


def net_of(name, **settings):
    """A small net whose batch norms have seen data, in training mode."""
    config = NetConfig(**{"width": 4, "channels": 2, "size": (8, 8), "classes": 3, **NETS[name], **settings})
    net = build(config, seed=0)
    for _ in range(3):
        net(torch.rand(16, *inputs_of(config)))
    return net


def inputs_of(config):
    return (config.channels, *config.size)


def example(name, batch=4):
    return torch.rand(batch, 2, *NETS[name].get("size", (8, 8)))


def mlp(stack=BARE, time="none"):
    torch.manual_seed(1)
    return Branch(3, stack, "mlp", time)


# The view is the model


@pytest.mark.parametrize("name", NETS)
def test_a_view_of_each_net_is_the_net(name):
    net, x = net_of(name), example(name)
    view = dynamics(net, x)
    with view.evaluation():
        torch.testing.assert_close(view(x), net(x))


@pytest.mark.parametrize("solver", TABLEAUX)
@pytest.mark.parametrize("kind", ["preact", "mlp"])
def test_the_steps_of_a_solver_compose_to_its_block(solver, kind):
    torch.manual_seed(0)
    stack = Stack(norm="group", activation="tanh")
    branch = Branch(4, stack, kind, "concat").double()
    block = ODEBlock(branch, solver, steps=5, t0=0.25, t1=1.5).double()
    x = torch.rand(2, 4, *((6, 6) if kind == "preact" else ()), dtype=torch.float64)
    view = dynamics(block)
    assert len(view.steps) == 5
    with view.evaluation():
        torch.testing.assert_close(view.run(x), block(x), rtol=1e-13, atol=1e-13)
        # After k steps the state is that of the trajectory at the time of step k.
        times = [step.t for step in view.steps]
        torch.testing.assert_close(
            torch.stack([view.run(x, 0, k) for k in range(5)]), block.trajectory(x, times), rtol=1e-13, atol=1e-13
        )


class Jump(nn.Module):
    """A field that jumps at 1/2; a step's stages all stand on the step's own side of it."""

    breakpoints = (0.5,)

    def forward(self, t, h):
        return h.cos() if resode.interval_time(t) < 0.5 else -3.0 * h


@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_steps_of_a_solver_keep_to_their_side_of_a_breakpoint(solver):
    block, x = ODEBlock(Jump(), solver, steps=4), torch.rand(2, 3, dtype=torch.float64)
    torch.testing.assert_close(dynamics(block)(x), block(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_steps_of_a_solver_use_the_statistics_of_their_time(solver):
    net = net_of("odenet", solver=solver, steps=3).double()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(8, 2, 8, 8, dtype=torch.float64))
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    view = dynamics(net)
    with view.evaluation():
        torch.testing.assert_close(view(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_run_of_some_steps_is_a_part_of_the_whole():
    view, x = dynamics(net_of("basic")), example("basic")
    with view.evaluation():
        h = view.stem(x)
        assert torch.equal(view.run(h, 2, 2), h)
        assert torch.equal(view.run(view.run(h, 0, 2), 2), view.run(h))
        assert torch.equal(view.head(view.run(h)), view(x))


def test_a_view_passes_gradients_to_the_weights():
    net = net_of("odenet", stack=BARE).eval()
    x = example("odenet")
    dynamics(net)(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


# What a step says of itself


def test_labels_stages_and_times_of_a_residual_net():
    view = dynamics(net_of("tied"))
    assert [step.label for step in view.steps] == [f"{s}.{b}" for s in (1, 2, 3) for b in (1, 2, 3)]
    assert [step.stage for step in view.steps] == [0] * 3 + [1] * 3 + [2] * 3
    assert [step.t for step in view.steps] == pytest.approx([0, 1 / 3, 2 / 3, 0, 0, 1 / 2, 0, 0, 1 / 2])
    assert {step.kind for step in view.steps} == {"residual"}


def test_labels_stages_and_times_of_an_ode_net():
    view = dynamics(net_of("odenet"))
    assert [(step.label, step.stage, step.t) for step in view.steps] == [
        ("1.1 t=0", 0, 0.0),
        ("1.1 t=0.5", 0, 0.5),
        ("2.1", 1, 0.0),
        ("2.2 t=0", 1, 0.0),
        ("3.1", 2, 0.0),
        ("3.2 t=0", 2, 0.0),
        ("3.2 t=0.333", 2, pytest.approx(1 / 3)),
        ("3.2 t=0.667", 2, pytest.approx(2 / 3)),
    ]


def test_kinds_of_the_steps_of_a_vgg():
    view = dynamics(net_of("vgg"))
    found = [(step.label, step.kind, step.stage) for step in view.steps]
    assert found == [
        ("1.1", "plain", 0),
        ("1.2", "plain", 0),
        ("1.3", "transition", 0),
        ("2.1", "plain", 1),
        ("2.2", "transition", 1),
    ]


@pytest.mark.parametrize("name", NETS)
def test_no_two_steps_have_one_label(name):
    labels = [step.label for step in dynamics(net_of(name)).steps]
    assert all(labels)
    assert len(set(labels)) == len(labels)


# A step without its branch


@pytest.mark.parametrize("name", ["basic", "preact"])
def test_a_deleted_residual_step_is_its_shortcut_and_what_follows(name):
    net = net_of(name).eval()
    view = dynamics(net)
    blocks = [block for stage in net.stages for block in stage]
    with view.evaluation():
        h = view.stem(example(name))
        for step, block in zip(view.steps, blocks, strict=True):
            expected = torch.relu(block.shortcut(h)) if name == "basic" else block.shortcut(h)
            assert torch.equal(step.deleted()(h), expected)
            assert step.deleted()(h).shape == step(h).shape
            h = step(h)


def test_a_deleted_residual_step_does_not_evaluate_its_branch():
    def never(t, h):
        raise AssertionError

    h = torch.rand(2, 3) - 0.5
    step = Step(kind="residual", branch=never, shortcut=lambda h: 2 * h, post=torch.relu)
    assert torch.equal(step.deleted()(h), torch.relu(2 * h))


def test_a_deleted_solver_step_is_the_identity():
    view = dynamics(ODEBlock(mlp(), steps=2))
    h = torch.rand(2, 3)
    assert torch.equal(view.steps[1].deleted()(h), h)
    assert not torch.equal(view.steps[1](h), h)


def test_a_deleted_plain_step_is_the_identity_and_a_transition_cannot_be_deleted():
    view = dynamics(net_of("vgg").eval())
    h = view.run(view.stem(example("vgg")), 0, 1)
    assert torch.equal(view.steps[1].deleted()(h), h)
    with pytest.raises(InvalidInput, match=r"step '1\.3' is a transition"):
        view.steps[2].deleted()(h)


def test_a_step_made_by_hand():
    h = torch.rand(2, 3)
    step = Step(kind="residual", branch=lambda t, h: t * h, scale=3.0, t=0.5, shortcut=torch.neg, post=torch.exp)
    torch.testing.assert_close(step(h), torch.exp(-h + 1.5 * h))
    plain = Step(kind="plain", branch=lambda t, h: t + h, t=0.5, shortcut=torch.neg, post=torch.exp, scale=3.0)
    torch.testing.assert_close(plain(h), h + 0.5)


# Models of others


class Tail(nn.Module):
    def forward(self, h):
        return h.flatten(1).sum(1, keepdim=True)


def test_a_sequence_with_stem_transitions_and_head():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), ResidualBlock(Branch(4), post=nn.ReLU()))),
        nn.MaxPool2d(2),
        ResidualBlock(Branch(4, kind="basic", out_channels=8), PadShortcut(4, 8)),
        nn.Sequential(ODEBlock(Branch(8, time="film"), "heun", steps=2)),
        nn.Dropout(0.5),
        Tail(),
    )
    x = torch.rand(8, 1, 10, 10)
    model(x)
    view = dynamics(model, x)
    assert [(step.label, step.kind) for step in view.steps] == [
        ("1", "residual"),
        ("2", "transition"),
        ("3", "residual"),
        ("4 t=0", "residual"),
        ("4 t=0.5", "residual"),
    ]
    assert {step.stage for step in view.steps} == {0}
    assert [type(part).__name__ for part in view.stem] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [type(part).__name__ for part in view.head] == ["Dropout", "Tail"]
    with view.evaluation():
        assert torch.equal(view.stem(x), nn.Sequential(model[0], *model[1][:1], nn.ReLU())(x))
        torch.testing.assert_close(view(x), model(x))


def test_a_block_alone_is_a_dynamics_of_itself():
    x = torch.rand(2, 3)
    for block, steps in ((ResidualBlock(mlp(), scale="skipinit"), 1), (ODEBlock(mlp(), "euler", steps=3), 3)):
        view = dynamics(block, x)
        assert len(view.steps) == steps
        assert torch.equal(view.stem(x), x)
        assert torch.equal(view.head(x), x)


def test_a_learned_scale_is_used_as_it_is_now():
    block = ResidualBlock(mlp(), scale="skipinit")
    view, x = dynamics(block), torch.rand(2, 3)
    assert torch.equal(view(x), x)
    with torch.no_grad():
        block.scale.fill_(2.0)
    assert torch.equal(view(x), block(x))
    assert not torch.equal(view(x), x)


def test_a_dynamics_by_hand_needs_steps_and_no_module():
    step = Step(kind="residual", branch=lambda t, h: h)
    view = ResidualDynamics(lambda x: x + 1, [step, step], lambda h: -h)
    assert torch.equal(view(torch.ones(2)), torch.full((2,), -8.0))
    with view.evaluation():
        assert not torch.is_grad_enabled()
    with pytest.raises(InvalidInput, match="at least one step"):
        ResidualDynamics(torch.neg, [], torch.neg)


# What cannot be read


def test_a_model_without_blocks_is_refused_with_what_it_holds():
    with pytest.raises(InvalidInput, match=r"cannot read a Sequential.*Flatten, Linear.*ResidualBlock.*by hand"):
        dynamics(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(InvalidInput, match="cannot read a Linear as steps: it holds no modules"):
        dynamics(nn.Linear(4, 2))
    with pytest.raises(InvalidInput, match="it holds nothing"):
        dynamics(nn.Sequential())


class Recurrent(nn.Module):
    """Its forward, not the order of its parts, says what it does."""

    def __init__(self):
        super().__init__()
        self.block = ResidualBlock(mlp())

    def forward(self, h):
        return self.block(self.block(h))


class Backwards(nn.Sequential):
    def forward(self, h):
        for module in reversed(self):
            h = module(h)
        return h


@pytest.mark.parametrize(
    ("model", "culprit"),
    [
        (Recurrent(), "Recurrent"),
        (Backwards(ResidualBlock(mlp()), nn.ReLU()), "Backwards"),
        (nn.Sequential(Recurrent(), ResidualBlock(mlp()), nn.Linear(3, 2)), "Recurrent"),
        (nn.Sequential(ResidualBlock(mlp()), Backwards(ODEBlock(mlp())), ResidualBlock(mlp())), "Backwards"),
        (nn.Sequential(ResidualBlock(mlp()), nn.Sequential(Recurrent())), "Recurrent"),
    ],
)
def test_a_module_that_hides_steps_is_refused_by_name(model, culprit):
    with pytest.raises(InvalidInput, match=f"cannot read .*the steps within {culprit} .*by hand"):
        dynamics(model)


def test_a_net_made_by_hand_may_nest_sequences_but_not_hide_steps():
    block, hidden = ResidualBlock(mlp()), Recurrent()
    net = Net(nn.Linear(2, 3), [nn.Sequential(nn.Sequential(block, nn.ReLU()), block)], nn.Linear(3, 2))
    view = dynamics(net, torch.rand(4, 2))
    assert [(step.label, step.kind) for step in view.steps] == [
        ("1.1", "residual"), ("1.2", "transition"), ("1.3", "residual")
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="cannot read a Net as steps: the steps within Recurrent"):
        dynamics(Net(nn.Identity(), [nn.Sequential(block, hidden)], nn.Identity()))


def advised(refusal, net):
    """The context manager that the refusal of ``net`` advises to read it within."""
    said = str(refusal.value)
    return eval(said[said.index("resode.solver_settings") :].removesuffix(", say"), {"resode": resode, "net": net})


@pytest.mark.parametrize(
    ("settings", "says", "steps"),
    [
        ({"solver": "explicit_adams"}, "is solved by explicit_adams, whose steps do not follow", 32),
        ({"gradient": "reversible", "steps": 4}, "is reversible: its steps act on two coupled states", 4),
    ],
)
def test_a_block_without_residual_steps_is_refused_with_advice_that_works(settings, says, steps):
    net = net_of("odenet", **settings)
    with pytest.raises(InvalidInput, match=rf"ODE block 1\.1 {says}") as refusal:
        dynamics(net)
    with advised(refusal, net):
        view = dynamics(net, example("odenet"))
    assert [step.kind for step in view.steps] == ["residual"] * (3 * steps + 2)


# Grids


def adaptive_net():
    return net_of("odenet", solver="dopri5", steps=None, rtol=1e-4, atol=1e-4)


def test_an_adaptive_block_needs_a_grid_or_an_example():
    net = adaptive_net()
    with pytest.raises(InvalidInput, match=r"ODE block 1\.1 is solved by dopri5 with steps of its choice.* grid=32"):
        dynamics(net)
    view = dynamics(net, grid=32)
    assert [step.end - step.t for step in view.steps if step.end] == pytest.approx([1 / 32] * 96)


def test_an_example_freezes_the_steps_that_an_adaptive_block_accepts():
    net, x = adaptive_net(), example("odenet")
    view = dynamics(net, x)
    net.eval()
    with torch.no_grad():
        out = net(x)
        blocks = [block for block in net.modules() if isinstance(block, ODEBlock)]
        accepted = [block.stats.accepted for block in blocks]
        torch.testing.assert_close(view(x), out, rtol=1e-5, atol=1e-5)
    solver_steps = [step for step in view.steps if step.end is not None]
    assert [sum(step.stage == s for step in solver_steps) for s in range(3)] == accepted
    assert max(accepted) > 1
    for s in range(3):
        of_stage = [step for step in solver_steps if step.stage == s]
        assert (of_stage[0].t, of_stage[-1].end) == (0.0, 1.0)
        assert all(a.end == b.t for a, b in pairwise(of_stage))


def test_a_grid_reads_every_block_at_its_resolution():
    net = net_of("odenet", solver="midpoint")
    view, x = dynamics(net, grid=6), example("odenet")
    with solver_settings(net, steps=6), view.evaluation():
        torch.testing.assert_close(view(x), net(x))
    points = (0.0, 0.1, 0.5, 1.0)
    assert [(step.t, step.end) for step in dynamics(net, grid=points).steps if step.stage == 0] == list(
        pairwise(points)
    )


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (0, "grid is 0 steps: at least 1"),
        (2.0, r"grid is 2\.0: a whole number of steps, or the points"),
        ((0.0, 0.5), r"must rise from 0 to 1"),
        ((0.0, 0.7, 0.5, 1.0), r"must rise from 0 to 1"),
        ((0.5,), r"must rise from 0 to 1"),
    ],
)
def test_a_grid_that_does_not_span_the_block_is_refused(grid, says):
    with pytest.raises(InvalidInput, match=says):
        dynamics(net_of("odenet"), grid=grid)


def test_a_number_of_steps_may_be_numpys():
    net = net_of("odenet")
    assert [step.t for step in dynamics(net, grid=np.int64(3)).steps] == [
        step.t for step in dynamics(net, grid=3).steps
    ]


def test_a_grid_needs_an_ode_block_and_its_breakpoints():
    with pytest.raises(InvalidInput, match="grid is 4, and this Net has no ODE block"):
        dynamics(net_of("basic"), grid=4)
    with pytest.raises(InvalidInput, match=r"steps over the breakpoint t = 0\.5"):
        dynamics(ODEBlock(Jump(), "rk4", steps=4), grid=3)


# Parts by hand


class Tower(nn.Module):
    """A model of nobody's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        for layer in self.inner:
            x = x + layer(x).tanh()
        return self.out(x)


def read_tower(model):
    steps = [
        Step(kind="residual", branch=lambda t, h, m=m: m(h).tanh(), label=name)
        for name, m in model.inner.named_children()
    ]
    return Parts(lambda x: x, steps, model.out, shape=(3,))


def test_a_model_of_any_kind_is_read_by_a_function():
    model = Tower()
    view, x = dynamics(model, read=read_tower), torch.rand(4, 3)
    assert torch.equal(view(x), model(x))
    assert [step.shapes for step in view.steps] == [((3,), (3,))] * 4
    with pytest.raises(
        InvalidInput, match=r"cannot read a Tower as steps: it holds inner \(ModuleList\), out \(Linear\)"
    ):
        dynamics(model)


def test_a_function_that_reads_a_model_wrong_is_caught_without_an_example():
    def wrong(model):
        parts = read_tower(model)
        return Parts(parts.stem, parts.steps[:-1], parts.head, parts.shape)

    with pytest.raises(InvalidInput, match="the steps read from Tower differ from it by"):
        dynamics(Tower(), read=wrong)


def test_a_function_that_gives_no_parts_is_refused():
    with pytest.raises(InvalidInput, match=r"read gives a tuple for this Tower: resode\.Parts\(stem, steps, head\)"):
        dynamics(Tower(), read=lambda model: (lambda x: x, read_tower(model).steps, model.out))


def test_what_is_no_module_is_refused():
    view = dynamics(net_of("basic"))
    with pytest.raises(InvalidInput, match=r"the model is a ResidualDynamics: an nn\.Module is expected"):
        dynamics(view)


@pytest.mark.parametrize("given", [torch.rand(0, 2, 8, 8), [1.0]])
def test_an_example_without_inputs_is_refused(given):
    with pytest.raises(InvalidInput, match=r"the example is a (tensor of shape \(0, 2, 8, 8\)|list): a batch of at"):
        dynamics(net_of("basic"), given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_do_not_pass_for_equal(bad):
    """Next to an infinite logit, any difference of the others would be small."""
    model = Tower()
    with torch.no_grad():
        model.out.bias[0] = bad

    def wrong(model):
        parts = read_tower(model)
        return Parts(parts.stem, parts.steps[:-1], parts.head, parts.shape)

    for read in (read_tower, wrong):
        with pytest.raises(InvalidInput, match="Tower gives numbers that are not finite, by which its steps cannot"):
            dynamics(model, read=read)


def test_reading_leaves_the_random_state_alone():
    net, state = net_of("basic"), torch.get_rng_state()
    dynamics(net)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reversible_block_is_read_as_the_plain_steps_of_its_solver_and_they_are_near():
    block, x = ODEBlock(mlp(), "rk4", steps=16, gradient="reversible"), torch.rand(4, 3)
    with solver_settings(block, gradient="backprop"):
        view = dynamics(block, x)
    with view.evaluation():
        torch.testing.assert_close(view(x), block(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(view(x), block(x))


@pytest.mark.parametrize("solver", ["dopri5", "tsit5", "dopri8", "bosh3", "adaptive_heun"])
def test_an_embedded_pair_with_a_number_of_steps_is_read_as_they_are(solver):
    net, x = net_of("odenet", solver=solver, steps=2), example("odenet")
    view = dynamics(net, x)
    assert len(view.steps) == 3 * 2 + 2
    with view.evaluation():
        torch.testing.assert_close(view(x), net(x))


# Extra channels


def test_extra_channels_come_and_go_as_transitions():
    block, x = ODEBlock(mlp(time="concat"), "heun", steps=2, extra_channels=1), torch.rand(4, 2)
    view = dynamics(block, x)
    assert [(step.label, step.kind) for step in view.steps] == [
        ("1 augment", "transition"), ("1 t=0", "residual"), ("1 t=0.5", "residual"), ("1 project", "transition")
    ]  # fmt: skip
    assert torch.equal(view.run(x, 0, 1), torch.cat([x, torch.zeros(4, 1)], 1))
    with view.evaluation():
        torch.testing.assert_close(view(x), block(x))
        torch.testing.assert_close(view.run(x, 0, 2), block.trajectory(x, [0.5])[0])
    h = view.run(x, 0, 1)
    assert torch.equal(view.steps[1].deleted()(h), h)
    for i in (0, 3):
        with pytest.raises(InvalidInput, match="is a transition"):
            view.steps[i].deleted()(h)


def test_a_view_stays_what_it_was_when_the_settings_change_back():
    net, x = net_of("odenet"), example("odenet")
    with solver_settings(net, steps=4, solver="euler"):
        view = dynamics(net, x)
        with view.evaluation():
            expected = net(x)
    with view.evaluation():
        torch.testing.assert_close(view(x), expected)
        assert not torch.allclose(net(x), expected)


def test_masks_of_training_do_not_stand_in_the_way_of_reading():
    # In training a grid of 2 steps would step over the ends of 4 mask intervals; in evaluation there are no masks.
    net = net_of("odenet", steps=4, mask_intervals=4, stack=Stack(dropout=Dropout(p=0.2)))
    assert net.training
    with solver_settings(net, steps=2):
        assert len(dynamics(net, example("odenet")).steps) == 3 * 2 + 2


class Scaled(ResidualBlock):
    def forward(self, h):
        return 1.5 * super().forward(h)


class Shortened(ResidualBlock):
    def forward(self, h):
        return super().forward(h)[:, :2]


class Smooth(PlainLayer):
    def forward(self, h):
        return super().forward(h) + 1.0


class Twice(ODEBlock):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize(
    "model",
    [
        Scaled(mlp()),
        nn.Sequential(ResidualBlock(mlp()), Scaled(mlp())),
        Twice(mlp()),
    ],
)
def test_an_example_finds_a_model_that_does_something_else(model):
    x = torch.rand(4, 3)
    assert dynamics(model).steps
    with pytest.raises(InvalidInput, match=rf"steps read from {type(model).__name__} differ from it by [0-9.e-]+ on"):
        dynamics(model, x)


def test_a_plain_layer_may_do_what_it_likes_for_its_step_is_its_whole_map():
    x = torch.rand(4, 3)
    model = nn.Sequential(Smooth(nn.Linear(3, 3)), Smooth(nn.Linear(3, 2)), nn.Linear(2, 2))
    view = dynamics(model, x)
    assert [step.kind for step in view.steps] == ["plain", "plain"]
    assert torch.equal(view(x), model(x))


def test_an_example_finds_a_model_that_gives_another_shape():
    with pytest.raises(InvalidInput, match=r"read from Shortened give \(4, 3\) on the example, and it gives \(4, 2\)"):
        dynamics(Shortened(mlp()), torch.rand(4, 3))


def test_an_example_finds_a_net_with_a_forward_of_its_own():
    net = net_of("basic")
    x = example("basic")
    dynamics(net, x)

    class Softmax(type(net)):
        def forward(self, x):
            return super().forward(x).softmax(1)

    net.__class__ = Softmax
    with pytest.raises(InvalidInput, match="steps read from Softmax differ"):
        dynamics(net, x)


# Modes


def mixed_modes(net):
    """Set every second module to evaluation mode; the modes of all."""
    for i, module in enumerate(net.modules()):
        module.training = i % 2 == 0
    return modes(net)


def modes(net):
    return {name: module.training for name, module in net.named_modules()}


def test_evaluation_restores_the_mode_of_every_module():
    net = net_of("basic")
    view, before = dynamics(net), mixed_modes(net)
    with view.evaluation():
        assert not any(modes(net).values())
        assert not torch.is_grad_enabled()
    assert modes(net) == before
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), view.evaluation():
        raise ZeroDivisionError
    assert modes(net) == before


@pytest.mark.parametrize("name", NETS)
def test_reading_and_checking_leave_the_model_as_it_was(name):
    net = net_of(name, stack=Stack(dropout=Dropout(p=0.3)))
    held = {key: value.clone() for key, value in net.state_dict().items()}
    before = mixed_modes(net)
    dynamics(net, example(name))
    assert modes(net) == before
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())


def test_a_failed_check_restores_the_modes_too():
    model = Scaled(mlp())
    before = mixed_modes(model)
    with pytest.raises(InvalidInput):
        dynamics(model, torch.rand(4, 3))
    assert modes(model) == before


def test_times_rise_within_each_ode_block():
    view = dynamics(ODEBlock(mlp(time="concat"), "midpoint", steps=7, t0=0.5, t1=2.0))
    times = [step.t for step in view.steps]
    assert times == pytest.approx([0.5 + 1.5 * i / 7 for i in range(7)])
    assert all(a < b for a, b in pairwise(times))
