"""The vocabulary of lesions against nets taken apart and run by hand, and its algebra."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import (
    FAMILIES,
    deletable,
    inputs,
    logits_of,
    net_of,
    reordered,
    scaled,
    units_of,
    view_of,
    without,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode import InvalidInput, ODEBlock, ResidualBlock, ResidualDynamics, Step, dynamics, evaluate
from resode.paths import applied, delete, noise, only, permute, scale, swap
from resode.paths.interventions import Intervention
from resode.paths.places import select

few = settings(deadline=None, max_examples=12)


@torch.no_grad()
def logits(view, x):
    return view(x)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Every word on every family of nets


def cases(units):
    """(intervention, what it makes of the net taken apart): of every word, by index and by stage, and composed."""
    able, last = deletable(units), units[-1].stage
    everywhere = [i for i, unit in enumerate(units) if unit.stage == last and (unit.movable or unit.shortcut)]
    yield from ((delete(i), without(units, [i])) for i in able)
    yield delete(0, 2), without(units, [0, 2])
    yield delete(stage=last), without(units, deletable(units, last))
    yield delete(stage=(0, last)), without(units, deletable(units, 0) + deletable(units, last))
    yield scale(0.3, 1), scaled(units, 0.3, [1])
    yield scale(-2.0, stage=last), scaled(units, -2.0, everywhere)
    yield permute((1, 2, 0), 0, 1, 2), reordered(units, (1, 2, 0), (0, 1, 2))
    yield permute((1, 2, 0), 0, 2, 1), reordered(units, (1, 2, 0), (0, 2, 1))
    yield swap(0, 2), reordered(units, (1, 0), (0, 2))
    yield only(0, 2), without(units, [i for i in able if i not in (0, 2)])
    yield only(stage=0), without(units, [i for i in able if units[i].stage != 0])
    yield only(), without(units, able)
    yield delete(1) >> scale(0.5, 0) >> swap(0, 2), reordered(scaled(without(units, [1]), 0.5, [0]), (1, 0), (0, 2))
    yield swap(0, 1) >> delete(0), without(reordered(units, (1, 0), (0, 1)), [0])
    yield scale(0.5, 0) >> scale(3.0, 0, 1), scaled(scaled(units, 0.5, [0]), 3.0, [0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_word_on_each_family_gives_the_logits_of_the_net_run_by_hand(family):
    net, x = net_of(family), inputs(family, 3)
    view, units = view_of(net), units_of(net)
    whole = logits_of(net, units, x)
    same(logits(view, x), whole)
    found = {}
    for change, changed in cases(units):
        found[change.name] = logits(change(view), x)
        same(found[change.name], logits_of(net, changed, x))
    # The test can tell: each does something, and no two words do the same.
    apart = {name: tuple(z.flatten().round(decimals=8).tolist()) for name, z in found.items()}
    alone = [name for name in apart if name.startswith(("scale", "swap", "permute")) and ">>" not in name]
    assert len({apart[name] for name in alone}) == len(alone)
    assert tuple(whole.flatten().round(decimals=8).tolist()) not in set(apart.values())


@pytest.mark.parametrize("family", ["basic", "vgg", "rk4", "hand"])
def test_a_model_under_an_intervention_answers_as_its_view(family):
    net, x = net_of(family), inputs(family, 3)
    units, read = units_of(net), {"read": type(net).read} if family == "hand" else {}
    changed = logits_of(net, reordered(without(units, [1]), (1, 0), (0, 2)), x)
    with torch.no_grad():
        with applied(net, delete(1), swap(0, 2), **read) as view:
            same(net(x), changed)
            same(view(x), changed)
        same(net(x), logits_of(net, units, x))


@pytest.mark.parametrize("family", ["basic", "midpoint"])
def test_steps_are_named_by_their_labels_too(family):
    net, x = net_of(family), inputs(family, 2)
    view = view_of(net)
    labels = [step.label for step in view.steps]
    for by_label, by_index in [
        (delete(labels[1], labels[4]), delete(1, 4)),
        (scale(0.1, labels[2], 0), scale(0.1, 2, 0)),
        (swap(labels[0], labels[2]), swap(0, 2)),
        (permute((2, 0, 1), *labels[:3]), permute((2, 0, 1), 0, 1, 2)),
        (only(labels[5]), only(5)),
    ]:
        assert torch.equal(logits(by_label(view), x), logits(by_index(view), x))


def test_scaling_a_stage_scales_layers_that_change_the_shape_too():
    net, x = net_of("vgg"), inputs("vgg", 2)
    # 2.1, from 64 to 128 channels, cannot be deleted; of the stage, only the pooling stays as it is.
    same(logits(scale(0.4, stage=1)(view_of(net)), x), logits_of(net, scaled(units_of(net), 0.4, [4, 5]), x))
    same(logits(delete(stage=1)(view_of(net)), x), logits_of(net, without(units_of(net), [5]), x))


# Intervals of t


@pytest.mark.parametrize("family", ["midpoint", "rk4"])
@pytest.mark.parametrize(("grid", "gone"), [(4, 1), (8, 2), (12, 3)])
def test_an_interval_deletes_as_many_steps_as_the_grid_has_there(family, grid, gone):
    net, x = net_of(family), inputs(family, 2)
    view, units = view_of(net, grid), units_of(net, grid)
    places = [i for i, unit in enumerate(units) if unit.end and unit.t >= 0.25 - 1e-9 and unit.end <= 0.5 + 1e-9]
    assert len(places) == 3 * gone
    lesioned = delete(interval=(0.25, 0.5))(view)
    assert [i for i, step in enumerate(lesioned.steps) if step.is_deleted] == places
    same(logits(lesioned, x), logits_of(net, without(units, places), x))
    # Within a stage, its own steps alone.
    of_stage = [i for i in places if units[i].stage == 1]
    assert len(of_stage) == gone
    same(
        logits(scale(0.5, stage=1, interval=(0.25, 0.5))(view), x),
        logits_of(net, scaled(units, 0.5, of_stage), x),
    )
    order = tuple(reversed(range(gone)))
    same(
        logits(permute(order, stage=1, interval=(0.25, 0.5))(view), x),
        logits_of(net, reordered(units, order, of_stage), x),
    )


def test_reordering_intervals_of_t_at_two_resolutions_moves_the_same_times():
    net = net_of("rk4")
    coarse = permute((1, 0), stage=0, interval=(0.0, 0.5))(view_of(net, 4))
    fine = permute((2, 3, 0, 1), stage=0, interval=(0.0, 0.5))(view_of(net, 8))
    assert [step.t for step in coarse.steps[:4]] == [0.25, 0.0, 0.5, 0.75]
    assert [step.t for step in fine.steps[:8]] == [0.25, 0.375, 0.0, 0.125, 0.5, 0.625, 0.75, 0.875]


def test_the_whole_interval_is_every_step_of_the_solver_and_no_block_between():
    net = net_of("midpoint")
    view = delete(interval=(0, 1))(view_of(net))
    assert [step.is_deleted for step in view.steps] == [step.end is not None for step in view.steps]
    assert sum(step.end is None for step in view.steps) == 2


@pytest.mark.parametrize(
    ("grid", "interval", "says"),
    [
        (4, (0.25, 0.4), r"t = 0\.4 is no point of the grid, but inside .*, which ends at 0\.5: .*grid=32"),
        (6, (0.25, 0.5), r"t = 0\.25 is no point of the grid, but inside"),
        (4, (-0.25, 0.5), r"t = -0\.25 is no point of the grid, but not in 0 … 1"),
        (4, (0.5, 1.25), r"t = 1\.25 is no point"),
        (4, (0.5, 0.5), "is empty"),
        (4, (0.5, 0.25), "is empty"),
    ],
)
def test_the_ends_of_an_interval_are_points_of_the_grid(grid, interval, says):
    with pytest.raises(InvalidInput, match=says):
        delete(interval=interval)(view_of(net_of("midpoint"), grid))


def test_each_block_in_an_interval_has_its_ends_as_points():
    # Blocks of 3, 2 and 1 steps: a half is a point of the second's grid, and of the third's interior.
    view = view_of(net_of("midpoint"))
    with pytest.raises(InvalidInput, match="inside the step"):
        delete(interval=(0.0, 0.5))(view)
    lesioned = delete(stage=1, interval=(0.0, 0.5))(view)
    assert [step.label for step in lesioned.steps if step.is_deleted] == ["2.2 t=0"]


def test_of_a_residual_net_the_blocks_whose_time_is_in_the_interval():
    net, x = net_of("basic"), inputs("basic", 2)
    units = units_of(net)
    # Times 0, 1/3, 2/3 in stage 1, and 0, 1/2 in the others, after a block that changes the shape and has none.
    assert [unit.t for unit in units] == [0, 1 / 3, 2 / 3, 0, 0, 0.5, 0, 0, 0.5]
    for interval, places in [((0, 0.4), [0, 1, 4, 7]), ((0.5, 1), [2, 5, 8]), ((1 / 3, 0.5), [1])]:
        assert select(view_of(net), interval=interval) == tuple(places)
        same(logits(delete(interval=interval)(view_of(net)), x), logits_of(net, without(units, places), x))


@pytest.mark.parametrize("family", ["plain", "vgg", "hand"])
def test_steps_without_times_are_in_no_interval(family):
    with pytest.raises(InvalidInput, match="no times that tell them apart"):
        delete(interval=(0, 0.5))(view_of(net_of(family)))


# Noise


def drawn(step, h, strength):
    """ε of a noisy step, found from what it gives."""
    f = evaluate(step.branch.branch, step.t, h)
    rms = f.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (f.ndim - 1))
    return (evaluate(step.branch, step.t, h) - f) / (strength * rms)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_noise_is_white_and_relative_to_the_size_of_each_samples_branch(family):
    net, x, strength = net_of(family), inputs(family, 3), 0.25
    units, view = units_of(net), noise(0.25, 1, seed=5)(view_of(net))
    h = view.run(view.stem(x), 0, 1)
    epsilon = drawn(view.steps[1], h.clone(), strength)
    same(drawn(view.steps[1], 7.0 * h + 1.0, strength), epsilon)  # of the seed, the place and the shape alone
    same(epsilon, epsilon[:1].expand_as(epsilon))
    assert abs(float(epsilon[0].square().mean()) - 1) < 5 * (2 / epsilon[0].numel()) ** 0.5
    assert abs(float(epsilon[0].mean())) < 5 / epsilon[0].numel() ** 0.5

    def noisy(h):
        f = units[1].branch(h)
        rms = f.square().flatten(1).mean(1).sqrt()
        return f + strength * rms.view(-1, *[1] * (f.ndim - 1)) * epsilon

    changed = [*units[:1], replace(units[1], branch=noisy), *units[2:]]
    same(view(x), logits_of(net, changed, x))
    assert not torch.allclose(view(x), logits_of(net, units, x))


@pytest.mark.parametrize("family", ["basic", "vgg", "midpoint"])
def test_noise_is_a_function_of_the_input_whatever_the_batch(family):
    view, x, state = noise(0.3, stage=0)(view_of(net_of(family))), inputs(family, 4), torch.get_rng_state()
    whole = logits(view, x)
    assert torch.equal(logits(view, x), whole)
    same(torch.cat([logits(view, part) for part in x.split(1)]), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_follows_from_the_seed_and_the_place():
    view, x = view_of(net_of("basic")), inputs("basic", 2)
    again = [logits(noise(0.3, 1, seed=seed)(view), x) for seed in (0, 1, 1)]
    assert torch.equal(again[1], again[2])
    assert not torch.allclose(again[0], again[1])
    both = noise(0.3, 1, 2)(view)
    h = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert not torch.allclose(drawn(both.steps[1], h, 0.3), drawn(both.steps[2], h, 0.3))


def test_noise_of_strength_0_changes_nothing():
    view, x = view_of(net_of("rk4")), inputs("rk4", 2)
    assert torch.equal(logits(noise(0.0, stage=(0, 1, 2))(view), x), logits(view, x))


def test_noise_on_a_branch_that_is_zero_is_none_and_has_a_gradient():
    h = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    step = Step(kind="residual", branch=lambda t, h: h * 2)
    (changed,) = noise(0.5, 0)(ResidualDynamics(nn.Identity(), [step], nn.Identity())).steps
    changed(h).sum().backward()
    assert torch.equal(changed(h), h)
    assert torch.equal(h.grad, torch.full_like(h, 3.0))


def test_noise_does_not_depend_on_the_layout_in_memory():
    view, x = noise(0.3, stage=1)(view_of(net_of("basic"))), inputs("basic", 2)
    same(logits(view, x.to(memory_format=torch.channels_last)), logits(view, x))


# Properties

NET = net_of("basic")
VIEW, X = view_of(NET), inputs("basic", 2)
places = st.lists(st.integers(0, len(VIEW.steps) - 1), min_size=1, max_size=4, unique=True)
interventions = st.one_of(
    places.map(lambda chosen: delete(*chosen)),
    places.map(lambda chosen: only(*chosen)),
    st.tuples(st.floats(-2, 2), places).map(lambda drawn: scale(drawn[0], *drawn[1])),
    st.tuples(st.floats(0, 2), places).map(lambda drawn: noise(drawn[0], *drawn[1])),
    st.permutations(range(3)).map(lambda order: permute(order, 0, 1, 2)),
    st.sampled_from([swap(0, 1), swap(4, 5), delete(stage=1), scale(0.5, interval=(0, 0.5))]),
)


def state_of(net):
    """All that a change could leave behind."""
    return {
        "values": {name: value.clone() for name, value in net.state_dict().items()},
        "modes": [module.training for module in net.modules()],
        "own": [sorted(name for name in vars(module) if not name.startswith("_")) for module in net.modules()],
        "hooks": [
            len(hooks)
            for module in net.modules()
            for name, hooks in vars(module).items()
            if name.endswith("hooks") and hooks is not None
        ],
        "gradients": [(p.grad is None, p.requires_grad) for p in net.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(net, before):
    after = state_of(net)
    for of in (before, after):
        of["values"] = {name: value.tolist() for name, value in of["values"].items()}
        of["random"] = of["random"].tolist()
    assert after == before


@few
@given(st.lists(interventions, min_size=1, max_size=3), st.integers(0, 2))
def test_nothing_is_left_behind(changes, mode):
    NET.train(mode == 1)
    if mode == 2:
        for i, module in enumerate(NET.modules()):
            module.training = i % 3 > 0
    before = state_of(NET)
    inner = None
    for change in changes:
        inner = change(inner or VIEW)
    with VIEW.evaluation():
        inner(X)
        with applied(NET, *changes):
            NET(X)
            with applied(NET, changes[0]), suppress(ZeroDivisionError), applied(NET, *changes):
                NET(X)
                raise ZeroDivisionError
            NET(X)
    with pytest.raises(InvalidInput), applied(NET, *changes, delete(99)):
        raise AssertionError
    assert_unchanged(NET, before)
    NET.eval()
    assert torch.equal(logits(NET, X), logits(VIEW, X))


@few
@given(st.permutations(range(3)), st.sampled_from([(0, 1, 2), (2, 0, 1), ("1.3", "1.1", "1.2")]))
def test_a_permutation_and_its_inverse_are_the_identity(order, steps):
    inverse = tuple(order.index(i) for i in range(3))
    again = (permute(order, *steps) >> permute(inverse, *steps))(VIEW)
    assert again.steps == VIEW.steps


@few
@given(places)
def test_scale_0_is_delete_for_residual_steps_and_scale_1_changes_nothing(chosen):
    assert torch.equal(logits(scale(0, *chosen)(VIEW), X), logits(delete(*chosen)(VIEW), X))
    assert torch.equal(logits(scale(1, *chosen)(VIEW), X), logits(VIEW, X))


@few
@given(places)
def test_only_and_delete_are_each_others_complements(kept):
    gone = [i for i in range(len(VIEW.steps)) if i not in kept]
    assert torch.equal(logits(only(*kept)(VIEW), X), logits(delete(*gone)(VIEW), X))


def test_only_all_changes_nothing_and_only_none_deletes_all():
    count = len(VIEW.steps)
    assert only(*range(count))(VIEW).steps == VIEW.steps
    assert torch.equal(logits(only()(VIEW), X), logits(delete(*range(count))(VIEW), X))


@pytest.mark.parametrize("family", ["plain", "vgg", "hand"])
def test_a_deleted_plain_step_is_the_identity_in_its_place(family):
    view = view_of(net_of(family))
    found = [i for i, step in enumerate(view.steps) if step.kind == "plain" and not step.not_deletable]
    assert found
    for i in found:
        h = torch.randn(2, *view.steps[i].shapes[0], dtype=torch.float64)
        held = h.clone()
        assert torch.equal(delete(i)(view).steps[i](h), held)


@few
@given(st.lists(interventions, min_size=3, max_size=3))
def test_composition_is_associative_and_applied_in_order(changes):
    a, b, c = changes
    found = logits(((a >> b) >> c)(VIEW), X)
    assert torch.equal(logits((a >> (b >> c))(VIEW), X), found)
    assert torch.equal(logits(c(b(a(VIEW))), X), found)
    with applied(NET, a, b), applied(NET, c):
        assert torch.equal(logits(NET, X), found)


# As a context


def test_an_inner_context_acts_on_what_the_outer_one_made_and_then_gives_it_back():
    with applied(NET, delete(1)) as outer:
        with applied(NET, scale(0.5, 2)) as inner:
            assert inner.steps[1].is_deleted
            assert torch.equal(logits(NET, X), logits((delete(1) >> scale(0.5, 2))(VIEW), X))
        assert torch.equal(logits(NET, X), logits(outer, X))
        with pytest.raises(InvalidInput, match="outermost"), applied(NET, grid=3):
            raise AssertionError


def test_a_forward_of_the_models_own_is_put_back():
    net = net_of("basic")
    own = net.forward = lambda x: type(net).forward(net, x)
    with applied(net, delete(0)):
        assert net.forward is not own
    assert net.forward is own


def test_hooks_of_the_model_see_the_changed_answers():
    seen = []
    handle = NET.register_forward_hook(lambda module, inputs, out: seen.append(out))
    try:
        with applied(NET, delete(0)):
            logits(NET, X)
    finally:
        handle.remove()
    assert torch.equal(seen[-1], logits(delete(0)(VIEW), X))


def test_an_adaptive_net_is_lesioned_on_the_steps_that_it_makes():
    net, x = net_of("midpoint", solver="dopri5", steps=None, rtol=1e-2, atol=1e-2), inputs("midpoint", 2)
    with applied(net, example=x) as view:
        same(logits(net, x), logits(view, x))
        first = next(step.end for step in view.steps if step.end is not None)
    with applied(net, delete(stage=0, interval=(0, first)), example=x) as view:
        assert [step.is_deleted for step in view.steps].count(True) == 1
    with pytest.raises(InvalidInput, match="grid=32"), applied(net, delete(0)):
        raise AssertionError


# What training makes of a change


@pytest.mark.parametrize("change", [scale(0.5, 0), noise(0.5, 0), delete(1), swap(0, 1)])
def test_a_learned_scale_stays_the_parameter_that_it_is(change):
    torch.manual_seed(0)
    fields = [nn.Linear(3, 3).double() for _ in range(2)]
    blocks = [ResidualBlock(Field(f), scale="skipinit") for f in fields]
    net, x = nn.Sequential(*blocks).double(), torch.randn(4, 3, dtype=torch.float64)
    view = change(dynamics(net))
    for value in (0.4, -1.5):
        with torch.no_grad():
            for block in blocks:
                block.scale.fill_(value)
        assert torch.equal(logits(view, x), logits(change(dynamics(net)), x))
        assert not torch.equal(logits(view, x), x)
    view(x).sum().backward()
    view(x).sum().backward()
    assert any(block.scale.grad is not None for block in blocks)
    assert torch.equal(logits(scale(0, 0, 1)(view), x), x)


class Field(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, t, h):
        return self.layer(h).tanh()


def test_a_block_that_stands_twice_is_deleted_in_one_place():
    torch.manual_seed(0)
    block = ResidualBlock(Field(nn.Linear(3, 3)))
    net, x = nn.Sequential(block, block), torch.randn(2, 3)
    with applied(net, delete(0)):
        assert torch.equal(logits(net, x), logits(block, x))


# Errors


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("basic", lambda: delete(), "delete what"),
        ("basic", lambda: permute(()), "permute what"),
        ("basic", lambda: scale(2.0), "scale what"),
        ("basic", lambda: delete(9), r"no step 9: .* 0 … 8"),
        ("basic", lambda: delete(-1), "no step -1"),
        ("basic", lambda: delete("9.9"), r"0 steps are labelled '9\.9'"),
        ("basic", lambda: delete([1, 2]), r"one by one.* not by \[1, 2\]"),
        ("basic", lambda: delete(1, 1), "delete 1, 1: each step can be named once"),
        ("basic", lambda: scale(0.5, 1, "1.2"), "named once"),
        ("basic", lambda: delete(1, stage=0), "not both"),
        ("basic", lambda: delete(stage=3), "no stage 3: this network has 0, 1, 2"),
        ("basic", lambda: delete(stage=(0, 7)), "no stage 7"),
        ("basic", lambda: delete(interval=(0.9, 1.0)), "no step is there"),
        ("basic", lambda: permute((0, 0), 1, 2), r"permute by \(0, 0\): a permutation of 0 … 1 .* steps 1, 2"),
        ("basic", lambda: permute((0, 1, 2), 1, 2), "a permutation"),
        ("basic", lambda: swap(2, 4), r"step '2\.2' turns .* stands for '1\.3'.* exchange steps of one shape"),
        ("basic", lambda: swap(1, 1), "named once"),
        ("basic", lambda: noise(-0.1, 0), "-0.1"),
        ("basic", lambda: noise(float("nan"), 0), "noise of strength nan"),
        ("basic", lambda: scale(float("inf"), 0), "scale by inf"),
        ("vgg", lambda: delete(3), "is a transition"),
        ("vgg", lambda: scale(2.0, 3), "is a transition"),
        ("vgg", lambda: only(3), "is a transition"),
        ("vgg", lambda: delete(4), "plain layer that turns"),
    ],
)
def test_what_cannot_be_done_is_refused(family, change, says):
    with pytest.raises(InvalidInput, match=says):
        change()(view_of(net_of(family)))


def test_a_model_in_place_of_its_view_is_refused():
    with pytest.raises(InvalidInput, match=r"delete 1: a view .* give resode\.dynamics\(net\)"):
        delete(1)(NET)


def test_numbers_of_numpy_name_steps_and_stages():
    chosen = np.arange(2)
    assert torch.equal(logits(delete(*chosen)(VIEW), X), logits(delete(0, 1)(VIEW), X))
    assert torch.equal(logits(delete(stage=np.int64(1))(VIEW), X), logits(delete(stage=1)(VIEW), X))


def test_names_tell_what_is_done():
    names = [
        delete(3, "2.1"),
        scale(0.5, stage=1),
        noise(0.1, 3, seed=2),
        permute((1, 0), 3, 4),
        swap(3, 4),
        only(),
        delete(interval=(0.25, 0.5)) >> delete(1),
    ]
    assert [change.name for change in names] == [
        "delete 3, 2.1",
        "scale stage 1 by 0.5",
        "noise 3 of 0.1, seed 2",
        "permute 3, 4 by (1, 0)",
        "swap 3 and 4",
        "only",
        "delete t from 0.25 to 0.5 >> delete 1",
    ]


def test_anyones_change_of_a_view_is_an_intervention():
    double = Intervention("twice", lambda view: view.with_steps([replace(step, scale=2.0) for step in view.steps]))
    assert torch.equal(logits((delete(0) >> double)(VIEW), X), logits((scale(2.0, *range(9)) >> delete(0))(VIEW), X))


def test_an_ode_block_alone_can_be_lesioned():
    torch.manual_seed(0)
    block, x = ODEBlock(Field(nn.Linear(3, 3)), solver="euler", steps=4), torch.randn(2, 3)
    with applied(block, delete(interval=(0.5, 1.0))):
        found = logits(block, x)
    h = x
    with torch.no_grad():
        for _ in range(2):
            h = h + 0.25 * block.branch(0.0, h)
    torch.testing.assert_close(found, h)
