"""The gradient modes agree for every solver, norm and dropout: a pairwise covering (``make test-full`` checks all)."""

import json
from itertools import combinations
from pathlib import Path

import pytest

import experiments
from experiments.gradient_product import CONFIGS, FACTORS, Config, cases, pairwise

FEW, ALL = cases(Config(every=False)), cases(CONFIGS["cpu"])


def name_of(case):
    solver, controlled = case.solver
    return "-".join((solver, "adaptive" if controlled else "fixed", case.gradient, case.norm, case.dropout))


@pytest.mark.parametrize("case", FEW, ids=name_of)
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
    assert len(set(ALL)) == len(ALL) == (11 + 5) * 3 * 6 * 6
    assert set(FEW) < set(ALL)


def test_the_published_outcome_is_of_the_whole_product_and_every_promise_holds():
    path = Path(experiments.__file__).parent.parent / "results" / "gradient_product-cpu.json"
    outcome = json.loads(path.read_text())["results"]["modes"]
    assert outcome["cases"] == sum(row["n"] for row in outcome["worst"]) == len(ALL)
    assert outcome["failures"] == []
