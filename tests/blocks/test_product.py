"""The gradient modes agree for every solver, norm and dropout: a pairwise covering (``make test-full`` checks all)."""

from itertools import combinations

import pytest

from experiments.gradient_product import FACTORS, cases, pairwise


def name_of(case):
    solver, controlled = case.solver
    return "-".join((solver, "adaptive" if controlled else "fixed", case.gradient, case.norm, case.dropout))


@pytest.mark.parametrize("case", cases(every=False), ids=name_of)
def test_gradients_are_those_that_the_mode_promises(case):
    measured = case.measure()
    assert case.holds(measured), f"{measured} (order {case.order})"


@pytest.mark.parametrize("factors", [FACTORS, {"a": "12345", "b": "123", "c": "1234", "d": "12", "e": "1"}])
def test_every_two_values_meet_in_a_pairwise_covering(factors):
    points = list(pairwise(factors))
    for one, other in combinations(factors, 2):
        met = {(point[one], point[other]) for point in points}
        assert met == {(a, b) for a in factors[one] for b in factors[other]}
    two, three = sorted((len(values) for values in factors.values()), reverse=True)[:2]
    assert len(points) <= 1.2 * two * three, "no more than the pairs of the two longest factors ask for, nearly"


def test_the_whole_product_is_every_solver_mode_norm_and_dropout():
    whole = cases(every=True)
    assert len(set(whole)) == len(whole) == (11 + 5) * 3 * 6 * 6
    assert set(cases(every=False)) < set(whole)
