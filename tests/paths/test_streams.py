"""Many networks on one batch: the answers of a forward pass of each, at the cost that was promised."""

from dataclasses import replace
from weakref import WeakSet

import pytest
import torch
from by_hand import FAMILIES, deletable, inputs, logits_of, net_of, reordered, scaled, units_of, view_of, without
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode import ResidualDynamics, Step
from resode.paths import delete, noise, permute, scale, swap
from resode.paths.streams import answers, default_streams, fork

STREAMS = (1, 2, 3, 50)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def answers_of(view, networks, x, streams):
    """The answers, by network, and the order in which they came."""
    found = list(answers(view, [network.steps for network in networks], x, streams))
    order = [answer.network for answer in found]
    return dict(found), order


def networks_of(view, units):
    """Changed networks of every kind, and what they are of the net taken apart; in no order of their forks."""
    able = deletable(units)
    return [
        *((delete(i)(view), without(units, [i])) for i in reversed(able)),
        (permute((1, 2, 0), 0, 1, 2)(view), reordered(units, (1, 2, 0), (0, 1, 2))),
        (view, units),
        (delete(*able)(view), without(units, able)),
        (swap(1, 2)(view), reordered(units, (1, 0), (1, 2))),
        (scale(0.5, able[-1])(view), scaled(units, 0.5, [able[-1]])),
        ((swap(0, 2) >> delete(1))(view), without(reordered(units, (1, 0), (0, 2)), [1])),
        (view, units),
        (delete(0)(view), without(units, [0])),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_those_of_forward_passes_by_hand_for_any_number_of_streams(family):
    net, x = net_of(family), inputs(family, 3)
    view, units = view_of(net), units_of(net)
    made = networks_of(view, units)
    networks, expected = [network for network, _ in made], [logits_of(net, changed, x) for _, changed in made]
    forks = [fork(view, network.steps) for network in networks]
    for streams in STREAMS:
        found, order = answers_of(view, networks, x.clone(), streams)
        assert order == [*sorted(range(len(networks)), key=forks.__getitem__), None]
        for i, logits in enumerate(expected):
            same(found[i], logits)
        same(found[None], logits_of(net, units, x))


@pytest.mark.parametrize("streams", STREAMS)
def test_noise_is_the_same_however_many_networks_run_at_once(streams):
    net, x = net_of("basic"), inputs("basic", 3)
    view = noise(0.4, 4, 7)(view_of(net))
    networks = [delete(i)(view) for i in range(9)]
    found, _ = answers_of(view, networks, x, streams)
    with torch.no_grad():
        for i, network in enumerate(networks):
            same(found[i], network(x))
        same(found[None], view(x))


def test_a_network_forks_at_its_first_other_step():
    view = view_of(net_of("basic"))
    assert fork(view, view.steps) == len(view.steps) == 9
    assert [fork(view, delete(i)(view).steps) for i in range(9)] == list(range(9))
    assert fork(view, swap(1, 2)(view).steps) == 1
    # Another object is another step, whatever it computes.
    assert fork(view, [*view.steps[:5], replace(view.steps[5]), *view.steps[6:]]) == 5


def test_without_networks_the_baseline_alone_is_answered():
    net, x = net_of("basic"), inputs("basic", 3)
    found, order = answers_of(view_of(net), [], x, 4)
    assert order == [None]
    same(found[None], logits_of(net, units_of(net), x))


def test_activations_that_overwrite_their_input_spoil_no_other_network():
    """A deleted block leaves its input to what follows: here to a ReLU in place, in the head and after the sum."""
    torch.manual_seed(0)
    fields, x = [nn.Linear(4, 4).double() for _ in range(3)], torch.randn(5, 4, dtype=torch.float64)
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3).double())
    for post in (nn.Identity(), nn.ReLU(inplace=True)):
        steps = [Step(kind="residual", branch=lambda t, h, f=f: f(h), post=post) for f in fields]
        view = ResidualDynamics(nn.Linear(4, 4).double(), steps, head)
        networks = [delete(*places)(view) for places in ((2,), (0,), (1, 2), (0, 1, 2), (2,))]
        for streams in STREAMS:
            found, _ = answers_of(view, networks, x, streams)
            with torch.no_grad():
                for i, network in enumerate(networks):
                    same(found[i], network(x))
                same(found[None], view(x))


# Cost


class Counted:
    """A branch that counts its calls and the images they were of."""

    def __init__(self, i):
        self.i, self.calls, self.images = i, 0, 0

    def __call__(self, t, h):
        self.calls += 1
        self.images += len(h)
        return torch.sin(h + self.i)


def counted(count):
    branches = [Counted(i) for i in range(count)]
    return ResidualDynamics(nn.Identity(), [Step(kind="residual", branch=f) for f in branches], nn.Identity()), branches


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_each_step_is_evaluated_once_for_the_baseline_and_once_for_each_network_that_has_left_it(data):
    count, batch = data.draw(st.integers(1, 5), "steps"), data.draw(st.integers(1, 3), "batch")
    view, branches = counted(count)
    sets = data.draw(st.lists(st.sets(st.integers(0, count - 1)), max_size=6), "deleted")
    streams = data.draw(st.integers(1, 7), "streams")
    networks = [delete(*places)(view) if places else view for places in sets]
    found, _ = answers_of(view, networks, torch.randn(batch, 2), streams)
    assert len(found) == len(sets) + 1
    for place, branch in enumerate(branches):
        gone = sum(1 for deleted in sets if deleted and min(deleted) < place and place not in deleted)
        assert branch.images == batch * (1 + gone)
        if streams == 1:
            assert branch.calls == 1 + gone


@pytest.mark.parametrize(("streams", "calls"), [(1, 28), (7, 13), (100, 13)])
def test_stacked_networks_share_the_calls_of_the_steps_that_they_share(streams, calls):
    view, branches = counted(7)
    answers_of(view, [delete(i)(view) for i in range(7)], torch.randn(3, 2), streams)
    # 7·8/2 evaluations one by one; stacked, one of the baseline and one of all that have left it, but at the first.
    assert sum(branch.calls for branch in branches) == calls
    assert sum(branch.images for branch in branches) == 3 * 28


def test_a_step_at_another_place_is_run_for_those_that_have_it_there():
    view, branches = counted(3)
    networks = [swap(0, 1)(view), swap(0, 2)(view), delete(0)(view), delete(0)(view)]
    answers_of(view, networks, torch.randn(1, 2), 4)
    # Place 0: 0 | 1, 2. Place 1: 1 | 0, 1 1 1. Place 2: 2 | 2 0 2 2.
    assert [branch.calls for branch in branches] == [1 + 1 + 1, 1 + 1 + 1, 1 + 1 + 1]
    assert [branch.images for branch in branches] == [1 + 1 + 1, 1 + 1 + 3, 1 + 1 + 3]


@pytest.mark.parametrize("streams", [1, 2])
def test_no_more_states_live_at_once_for_more_networks(streams):
    def peak_of(count):
        alive, peak = WeakSet(), 0

        def post(h):
            nonlocal peak
            h = torch.sin(h)
            alive.add(h)
            peak = max(peak, len(alive))
            return h

        steps = [Step(kind="residual", branch=lambda t, h: h, post=post) for _ in range(5)]
        view = ResidualDynamics(nn.Identity(), steps, nn.Identity())
        for _ in answers(view, [delete(i % 5)(view).steps for i in range(count)], torch.randn(2, 2), streams):
            pass
        return peak

    few = peak_of(4)
    assert 2 <= few <= 2 * streams + 2
    assert peak_of(100) == few


# How many at once


def test_a_gpu_takes_as_many_networks_as_make_up_the_pixels_of_4096_small_images():
    def streams(*shape, device="meta"):
        return default_streams(torch.empty(shape, device=device))

    assert streams(256, 3, 32, 32) == 16
    assert streams(8192, 3, 32, 32) == 1
    assert streams(64, 3, 224, 224) == 1
    assert streams(16, 3, 224, 224) == 5
    assert streams(256, 2) == 16 * 1024  # points
    assert streams(256, 3, 32, 32, device="cpu") == 1
