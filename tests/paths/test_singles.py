"""Gradients of single paths: all of them, and samples as Veit et al. take them."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from jacobians import dense, ways
from test_spectrum import X, batch, by_hand, cross_entropy, net_of, norms_of, small_net, square, states
from torch import nn

from resode import InvalidInput, ResidualDynamics, Step, dynamics
from resode.paths import spectrum

# All paths


@pytest.mark.parametrize("name", ["basic", "preact", "plain", "euler", "rk4", "points"])
def test_the_paths_of_each_length_sum_to_its_part(name):
    net, x = net_of(name), batch(name, 2)
    view = dynamics(net)
    exact = spectrum.gradient(view, x, cross_entropy)
    fixed = sum(step.is_counted for step in view.steps)
    found, sums = list(spectrum.paths(view, x, cross_entropy)), torch.zeros_like(exact.parts)
    for choices, gradient in found:
        sums[fixed + sum(choices)] += gradient
    torch.testing.assert_close(sums, exact.parts, rtol=1e-11, atol=1e-13)
    count = sum(step.has_choice for step in view.steps)
    assert {choices for choices, _ in found} == set(itertools.product((False, True), repeat=count))
    assert len(found) == 2**count == sum(exact.counts)


def test_the_gradient_of_a_path_is_the_product_of_the_jacobians_along_it():
    net, x = small_net("basic")
    view = dynamics(net)
    with view.evaluation():
        before = states(view, x)
        factors = [dict(ways(step, h)) for step, h in zip(view.steps, before, strict=False)]
        stem = dense(view.stem, x)
    v = spectrum.gradient(view, x, cross_entropy, at=len(view.steps)).parts[0].flatten()
    for choices, gradient in spectrum.paths(view, x, cross_entropy):
        expected = v
        for through, ways_of_step in reversed(list(zip(choices, factors, strict=True))):
            expected = expected @ ways_of_step[int(through)]
        torch.testing.assert_close(gradient.flatten(), expected @ stem, rtol=1e-11, atol=1e-14)


def test_paths_lie_through_plain_steps_and_pass_deleted_ones_and_transitions():
    view, (W, *_) = by_hand(3)
    steps = [
        Step(kind="transition", branch=lambda t, h: h.exp()),
        replace(view.steps[0], scale=-0.5, shortcut=lambda h: h @ W, post=torch.sin),
        Step(kind="plain", branch=lambda t, h: (h @ W).cos()),
        view.steps[1].deleted(),
        view.steps[2],
    ]
    view = view.with_steps(steps)
    found = dict(spectrum.paths(view, X, square))
    assert set(found) == set(itertools.product((False, True), repeat=2))
    exact = spectrum.gradient(view, X, square).parts
    torch.testing.assert_close(found[False, True] + found[True, False], exact[2], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[True, True], exact[3], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(found[False, True], found[True, False])


def test_a_path_through_a_constant_is_nothing():
    constant = Step(kind="residual", branch=lambda t, h: torch.ones_like(h))
    view = ResidualDynamics(lambda x: 2.0 * x, [constant, constant], lambda h: h)
    found = dict(spectrum.paths(view, X, torch.sum))
    assert torch.equal(found[False, False], torch.full_like(X, 2.0))
    assert not any(found[path].any() for path in found if path != (False, False))
    assert spectrum.sampled(view, X, torch.sum).norms == (pytest.approx(2 * math.sqrt(3)), 0.0, 0.0)


def test_too_many_paths_are_refused_before_anything_is_computed():
    def never(x):
        raise AssertionError

    step = Step(kind="residual", branch=lambda t, h: h)
    with pytest.raises(InvalidInput, match=r"17 residual steps make 2\^17 paths: at most 16"):
        spectrum.paths(ResidualDynamics(never, [step] * 17, never), X, square)


def test_the_iteration_leaves_modes_and_gradients_to_others():
    net, x = net_of("preact", scale="skipinit"), batch("preact", 2)  # with scales that are parameters
    for _, gradient in spectrum.paths(dynamics(net), x, cross_entropy):
        assert net.training
        assert torch.is_grad_enabled()
        assert all(p.requires_grad for p in net.parameters())
        assert not gradient.requires_grad


# Sampled paths


def mean_norms(view, x, loss):
    """{length: norms of all paths}, as means over the samples of the batch."""
    fixed, found = sum(step.is_counted for step in view.steps), {}
    for choices, gradient in spectrum.paths(view, x, loss):
        found.setdefault(fixed + sum(choices), []).append(float(norms_of(gradient).mean()))
    return found


def test_where_all_paths_are_few_enough_they_are_all_taken():
    view, _ = by_hand(5)
    every = mean_norms(view, X, square)
    found = spectrum.sampled(view, X, square, samples=10)
    assert found.counts == found.drawn == (1, 5, 10, 10, 5, 1)
    assert found.errors == (0.0,) * 6
    for k, norms in every.items():
        assert found.norms[k] == pytest.approx(sum(norms) / len(norms))
        assert found.totals[k] == pytest.approx(sum(norms))


def test_the_mean_over_samples_is_that_over_all_paths():
    view, _ = by_hand(6)
    every = mean_norms(view, X, square)
    runs = [spectrum.sampled(view, X, square, samples=5, seed=seed) for seed in range(200)]
    assert runs[0].drawn == (1, 5, 5, 5, 5, 5, 1)
    for k in (2, 3, 4):
        means = torch.tensor([run.norms[k] for run in runs], dtype=torch.float64)
        error = float(means.std()) / math.sqrt(len(runs))
        exact = torch.tensor(every[k], dtype=torch.float64)
        assert abs(float(means.mean()) - float(exact.mean())) < 4 * error
        assert error < 0.1 * float(exact.mean())
        # The spread of the means is what their standard errors say: that of a path over √5.
        assert float(means.std()) == pytest.approx(float(exact.std(correction=0)) / math.sqrt(5), rel=0.2)
        squares = torch.tensor([run.errors[k] ** 2 for run in runs], dtype=torch.float64)
        assert float(squares.mean()) == pytest.approx(float(means.var()), rel=0.3)
        assert runs[0].total_errors[k] == pytest.approx(math.comb(6, k) * runs[0].errors[k])


def test_a_sample_is_that_of_its_seed_and_of_no_other_random_state():
    view, _ = by_hand(6)
    state = torch.get_rng_state()
    first = spectrum.sampled(view, X, square, samples=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert spectrum.sampled(view, X, square, samples=4, seed=3) == first
    assert spectrum.sampled(view, X, square, samples=4, seed=4) != first


def test_plain_steps_shift_the_lengths_of_the_samples():
    net, x = net_of("plain"), batch("plain", 2)
    view = dynamics(net)
    found = spectrum.sampled(view, x, cross_entropy, samples=3)
    length = sum(step.is_counted for step in view.steps)
    assert found.counts == found.drawn == (0,) * length + (1,)
    assert found.norms[:length] == (0.0,) * length
    gradient = spectrum.gradient(view, x, cross_entropy)
    assert found.totals[length] == pytest.approx(float(gradient.norms[length]))
    assert json.loads(json.dumps(found.to_dict()))["totals"] == list(found.totals)


def test_paths_of_one_length_cancel_so_that_their_part_is_smaller_than_their_norms():
    view, _ = by_hand(8)
    exact, found = spectrum.gradient(view, X, square), spectrum.sampled(view, X, square, samples=1000)
    for total, norm in zip(found.totals, exact.norms.tolist(), strict=True):
        assert norm <= total * (1 + 1e-12)
    assert float(exact.norms[4]) < 0.5 * found.totals[4]


def test_one_evaluation_of_each_step_serves_all_samples():
    calls = []

    class Noted(nn.Module):
        def forward(self, t, h):
            calls.append(t)
            return h.tanh()

    view = ResidualDynamics(lambda x: x, [Step(kind="residual", branch=Noted())] * 6, lambda h: h)
    spectrum.sampled(view, X, square)
    assert len(calls) == 6
    list(spectrum.paths(view, X, square))
    assert len(calls) == 12


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_a_sample_of_one_tells_no_error(samples):
    view, _ = by_hand()
    with pytest.raises(InvalidInput, match=f"samples is {samples}: at least 2"):
        spectrum.sampled(view, X, square, samples)
