"""Counting paths: one by one, by identities, and the lengths that carry a gradient."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resode import Branch, InvalidInput, ODEBlock, ResidualDynamics, Stack, Step, dynamics
from resode.blocks import TABLEAUX
from resode.paths import delete, lengths, spectrum

RESIDUAL = Step(kind="residual", branch=lambda t, h: h)
PLAIN = Step(kind="plain", branch=lambda t, h: h)
TRANSITION = Step(kind="transition", branch=lambda t, h: h)
KINDS = [RESIDUAL, PLAIN, TRANSITION, RESIDUAL.deleted(), PLAIN.deleted()]


@given(st.lists(st.sampled_from(KINDS), max_size=9))
def test_counts_are_those_of_paths_counted_one_by_one(steps):
    ways = [(0, 1) if s is RESIDUAL else (1,) if s is PLAIN else (0,) for s in steps]
    found = [sum(path) for path in itertools.product(*ways)]
    assert lengths.counts(steps) == tuple(found.count(k) for k in range(max(found) + 1))


def test_lengths_are_binomial_and_plain_steps_shift_them():
    assert lengths.counts([RESIDUAL] * 54) == tuple(math.comb(54, k) for k in range(55))
    assert lengths.counts([PLAIN] * 2 + [RESIDUAL] * 3) == (0, 0, 1, 3, 3, 1)
    assert lengths.distribution(lengths.counts([RESIDUAL] * 4)) == (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    view = ResidualDynamics(lambda x: x, [PLAIN, RESIDUAL], lambda h: h)
    assert lengths.counts(view) == (0, 1, 1)
    assert lengths.counts(delete(1)(view)) == (0, 1)
    assert lengths.counts_from_each(view) == ((0, 1, 1), (1, 1), (1,))


def test_counts_are_exact_however_many_paths_there_are():
    counts = lengths.counts([RESIDUAL] * 1200)
    assert sum(counts) == 2**1200
    assert sum(lengths.distribution(counts)) == pytest.approx(1.0, abs=1e-12)
    assert lengths.magnitudes(counts, [0.5**1000 * 0.5**k for k in range(1201)])[0] == 0.5**1000
    assert lengths.magnitudes((2**2000,), (0.5**1000,)) == (2.0**1000,)
    assert lengths.magnitudes((2**2000,), (1.0,)) == (math.inf,)


def test_the_range_of_veit_et_al_is_0_45_percent_of_the_paths_by_counting_alone():
    counts = lengths.counts([RESIDUAL] * 54)
    share = lengths.share_between(counts, 5, 17)
    assert share == pytest.approx(sum(math.comb(54, k) for k in range(5, 18)) / 2**54, rel=1e-14)
    assert round(100 * share, 4) == 0.4537
    # Whatever carries the gradient there is found with that share.
    found = lengths.effective([1.0 if 5 <= k <= 17 else 0.0 for k in range(55)], counts, share=1.0)
    assert found == lengths.Effective(5, 17, 1.0, share)


# Evaluations of f


@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_chains_of_stages_counted_one_by_one(solver):
    tableau, found = TABLEAUX[solver], []
    for taken in itertools.product((False, True), repeat=tableau.stages):
        chain = [i for i in range(tableau.stages) if taken[i]]
        links = [tableau.a[after][before] for before, after in itertools.pairwise(chain)]
        if not chain or (tableau.b[chain[-1]] != 0.0 and all(links)):
            found.append(len(chain))
    assert lengths.chains(tableau) == tuple(found.count(k) for k in range(max(found) + 1))


def test_the_chains_of_known_methods():
    assert lengths.chains(TABLEAUX["euler"]) == (1, 1)
    assert lengths.chains(TABLEAUX["midpoint"]) == (1, 1, 1)
    assert lengths.chains(TABLEAUX["heun"]) == (1, 2, 1)
    assert lengths.chains(TABLEAUX["rk4"]) == (1, 4, 3, 2, 1)


def test_a_solvers_step_counts_as_one_branch_or_by_its_evaluations():
    view = dynamics(ODEBlock(Branch(3, Stack(norm="none"), "mlp"), "heun", 2, extra_channels=1))
    assert lengths.counts(view) == (1, 2, 1)
    assert lengths.counts(view, "evaluation") == (1, 4, 6, 4, 1)  # (1 + 2z + z²)²
    assert lengths.counts([*view.steps, RESIDUAL, PLAIN], "evaluation") == (0, 1, 5, 10, 10, 5, 1)
    assert lengths.counts(delete(1)(view), "evaluation") == (1, 2, 1)
    with pytest.raises(InvalidInput, match="unknown grade 'stage'"):
        lengths.counts(view, "stage")


# Effective lengths

magnitudes = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=12).filter(any)


@given(magnitudes, st.floats(0.01, 1.0))
def test_the_effective_lengths_are_the_shortest_run_that_carries_enough(values, share):
    counts = lengths.counts([RESIDUAL] * (len(values) - 1))
    found = lengths.effective(values, counts, share)
    total = math.fsum(values)
    runs = {(a, b): math.fsum(values[a : b + 1]) / total for a in range(len(values)) for b in range(a, len(values))}
    carried = runs[found.first, found.last]
    assert found.share == pytest.approx(carried)
    assert carried >= share * (1 - 1e-9)
    shorter = [mass for (a, b), mass in runs.items() if b - a < found.last - found.first]
    equal = [mass for (a, b), mass in runs.items() if b - a == found.last - found.first]
    assert all(mass < share * (1 + 1e-9) for mass in shorter)
    assert carried >= max(equal) * (1 - 1e-9)
    assert found.paths == pytest.approx(sum(counts[found.first : found.last + 1]) / sum(counts))


def test_effective_lengths_by_hand():
    counts = (1, 4, 6, 4, 1)
    assert lengths.effective([0, 1, 8, 1, 0], counts, 0.8) == lengths.Effective(2, 2, 0.8, 6 / 16)
    assert lengths.effective([0, 1, 8, 1, 0], counts) == lengths.Effective(1, 3, 1.0, 14 / 16)
    # Of two runs of one length, the one that carries more; lengths that were left out carry nothing, but are paths.
    assert lengths.effective([3, 3, 4], counts, 0.6) == lengths.Effective(1, 2, 0.7, 10 / 16)
    found = lengths.effective([5.0, 5.0], counts, 1.0)
    assert json.loads(json.dumps(found.to_dict())) == {"first": 0, "last": 1, "share": 1.0, "paths": 5 / 16}


def test_effective_lengths_of_a_spectrum():
    view = ResidualDynamics(lambda x: x, [Step(kind="residual", branch=lambda t, h: 0.1 * h)] * 10, lambda h: h)
    exact = spectrum.gradient(view, torch.ones(2, 3), torch.sum)
    sampled = spectrum.sampled(view, torch.ones(2, 3), torch.sum)
    # Paths of one direction do not cancel, and both quantities are C(10, k)/10^k.
    expected = lengths.effective([math.comb(10, k) * 0.1**k for k in range(11)], exact.counts)
    for values in (exact.norms, sampled.totals):
        found = lengths.effective(values, exact.counts)
        assert (found.first, found.last, found.paths) == (expected.first, expected.last, expected.paths)
        assert found.share == pytest.approx(expected.share)


@pytest.mark.parametrize(
    ("values", "share", "says"),
    [
        ([1.0], 0.0, "share is 0.0: .* in \\(0, 1\\]"),
        ([1.0], 1.5, "share is 1.5"),
        ([1.0, 1.0, 1.0], 0.9, "3 magnitudes for the 2 lengths"),
        ([1.0, -1.0], 0.9, "at least 0"),
        ([1.0, math.nan], 0.9, "finite"),
        ([math.inf], 0.9, "finite"),
        ([0.0, 0.0], 0.9, "all magnitudes are 0"),
        ([], 0.9, "all magnitudes are 0"),
    ],
)
def test_what_has_no_effective_lengths(values, share, says):
    with pytest.raises(InvalidInput, match=says):
        lengths.effective(values, (1, 1), share)
