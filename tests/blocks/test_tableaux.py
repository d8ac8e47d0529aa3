"""Butcher tableaux: order conditions over rooted trees, the properties of each table, and a peer's tables."""

from functools import cache
from math import prod

import numpy as np
import pytest
from torchdiffeq._impl.odeint import SOLVERS

from resode.blocks.tableaux import ADAPTIVE, TABLEAUX, Tableau
from resode.errors import InvalidInput

# The conditions add products of coefficients as large as 16, each rounded to 16 digits. That leaves 2e-14 (tsit5); the
# fractions of dopri8 that approximate irrational numbers are good to 6e-18 and add nothing.
HOLDS = 1e-12
# The first order that fails does so by its error coefficients: 8e-6 for dopri8 (the smallest), far above rounding.
FAILS = 1e-6

SOLUTIONS = [pytest.param(t, t.b, t.order, id=t.name) for t in TABLEAUX.values()] + [
    pytest.param(t, t.embedded, t.embedded_order, id=f"{t.name}-embedded") for t in TABLEAUX.values() if t.adaptive
]


def grafted(tree):
    """The trees with one node more: a leaf put on any node. A tree is the sorted tuple of its root's subtrees."""
    yield tuple(sorted((*tree, ())))
    for i, child in enumerate(tree):
        for grown in grafted(child):
            yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))


@cache
def rooted_trees(nodes):
    """All rooted trees with so many nodes (HNW I, section II.2)."""
    return [()] if nodes == 1 else sorted({grown for tree in rooted_trees(nodes - 1) for grown in grafted(tree)})


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    """γ(τ) = |τ| Π γ(τ_i) over the root's subtrees (HNW I, section II.2)."""
    return size(tree) * prod(map(density, tree))


def elementary_weights(a, tree):
    """Φ_i(τ) = Π Σ_j a_ij Φ_j(τ_k) over the root's subtrees, a vector over the stages (HNW I, section II.2)."""
    return prod((a @ elementary_weights(a, child) for child in tree), start=np.ones(len(a)))


def matrix(tableau):
    """The square matrix a, with zeros on and above the diagonal."""
    return np.array([(*row, *[0.0] * (tableau.stages - len(row))) for row in tableau.a])


def defects(tableau, weights, order):
    """|Σ_i b_i Φ_i(τ) − 1/γ(τ)| of every tree with ``order`` nodes (HNW I, theorem II.2.13)."""
    a = matrix(tableau)
    return [abs(weights @ elementary_weights(a, tree) - 1 / density(tree)) for tree in rooted_trees(order)]


def test_the_rooted_trees_are_all_there():
    # Cayley's numbers (OEIS A000081): a tree left out would be a condition left out.
    assert [len(rooted_trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@pytest.mark.parametrize(("tableau", "weights", "order"), SOLUTIONS)
def test_order_conditions_hold_up_to_the_order_and_fail_after_it(tableau, weights, order):
    for p in range(1, order + 1):
        assert max(defects(tableau, weights, p)) < HOLDS
    assert max(defects(tableau, weights, order + 1)) > FAILS


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_shapes_and_row_sums(tableau):
    assert tableau.stages == len(tableau.a) == len(tableau.b) == len(tableau.c)
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    # c_i = Σ_j a_ij (HNW I, eq. II.1.9), to the rounding of sums whose terms are as large as 16.
    np.testing.assert_allclose(matrix(tableau).sum(1), tableau.c, rtol=0, atol=1e-14)


def test_names():
    names = "euler midpoint heun ralston rk4 rk4-38 bosh3 tsit5 dopri5 dopri8 adaptive_heun"
    assert list(TABLEAUX) == names.split()
    assert all(name == tableau.name for name, tableau in TABLEAUX.items())
    assert ADAPTIVE == ("bosh3", "tsit5", "dopri5", "dopri8", "adaptive_heun")
    assert all(TABLEAUX[name].adaptive == (name in ADAPTIVE) for name in TABLEAUX)


@pytest.mark.parametrize(
    ("name", "stages", "solution_stages", "fsal"),
    [
        ("euler", 1, 1, False),
        ("midpoint", 2, 2, False),
        ("heun", 2, 2, False),
        ("ralston", 2, 2, False),
        ("rk4", 4, 4, False),
        ("rk4-38", 4, 4, False),
        ("bosh3", 4, 3, True),
        ("tsit5", 7, 6, True),
        ("dopri5", 7, 6, True),
        ("dopri8", 13, 13, False),
        ("adaptive_heun", 2, 2, False),
    ],
)
def test_stages_and_first_same_as_last(name, stages, solution_stages, fsal):
    tableau = TABLEAUX[name]
    assert (tableau.stages, tableau.solution_stages, tableau.fsal) == (stages, solution_stages, fsal)


def test_a_last_stage_at_another_point_is_not_the_next_first():
    # b_s = 0 alone is not enough: the last stage must be taken at the solution, and at the end of the step.
    elsewhere = Tableau("elsewhere", 1, a=((), (0.5,)), b=(1.0, 0.0), c=(0.0, 1.0))
    earlier = Tableau("earlier", 1, a=((), (1.0,)), b=(1.0, 0.0), c=(0.0, 0.5))
    assert not elsewhere.fsal
    assert not earlier.fsal


@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_weights(name):
    tableau = TABLEAUX[name]
    # A constant field is solved exactly by both solutions: no error, to the rounding of weights as large as 3.
    assert abs(sum(tableau.error)) < 1e-14
    np.testing.assert_array_equal(tableau.error, np.subtract(tableau.b, tableau.embedded))


def test_no_error_weights_without_a_second_solution():
    with pytest.raises(InvalidInput, match=r"rk4 has no embedded solution.*dopri5"):
        _ = TABLEAUX["rk4"].error


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dopri8", "adaptive_heun"])
def test_agrees_with_torchdiffeq(name):
    ours, theirs = TABLEAUX[name], SOLVERS[name].tableau
    n = ours.stages
    # Theirs leave the first stage out of the times and rows, and give dopri8 a 14th stage, at the solution, for its
    # interpolation: its row is b, and it weighs nothing.
    times, rows = theirs.alpha.numpy(), [row.numpy() for row in theirs.beta]
    weights, error = theirs.c_sol.numpy(), theirs.c_error.numpy()
    np.testing.assert_array_equal(ours.c[1:], times[: n - 1])
    for ours_row, theirs_row in zip(ours.a[1:], rows[: n - 1], strict=True):
        np.testing.assert_array_equal(ours_row, theirs_row)
    np.testing.assert_array_equal(ours.b, weights[:n])
    assert not np.any(weights[n:])
    assert not np.any(error[n:])
    factor = {"adaptive_heun": -1.0}.get(name, 1.0)  # theirs is b̂ − b
    np.testing.assert_allclose(factor * np.array(ours.error), error[:n], rtol=0, atol=1e-15)
