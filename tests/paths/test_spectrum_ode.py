"""The terms of the Dyson series of the adjoint equation: closed forms, orders, and every chain of stages by itself."""

import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from jacobians import dense, solver_ways, sums_over_paths
from torch import nn

from resode import Branch, InvalidInput, ODEBlock, ResidualDynamics, Stack, dynamics
from resode.blocks import TABLEAUX
from resode.paths import delete, lengths, noise, scale, spectrum

X, V = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A = torch.tensor([[0.3, -1.0, 0.2], [0.8, 0.1, 0.5], [-0.4, 0.6, -0.7]], dtype=torch.float64)


class Field(nn.Module):
    """dh/dt = a(t) A h with a(t) = exp(−2t)."""

    def forward(self, t, h):
        return math.exp(-2.0 * t) * h @ A.T


INTEGRAL = (1.0 - math.exp(-2.0)) / 2.0
"""Of a from 0 to 1."""


def against_v(z):
    return (V * z).sum()


@cache
def terms(solver, steps, grade, most):
    """The first parts of the gradient of ⟨V, h(1)⟩ in h(0)."""
    return spectrum.gradient(dynamics(ODEBlock(Field(), solver, steps)), X, against_v, most, grade)


def closed_form(k):
    """The k-th term of the series: J(s) and J(t) commute, and so it is (A ∫a)^k/k!, transposed."""
    return V @ torch.linalg.matrix_power(INTEGRAL * A, k) / math.factorial(k)


def slope(solver, grade, k, steps):
    """The order at which the k-th term converges, from ``steps`` to twice as many."""
    coarse, fine = ((terms(solver, n, grade, 4).parts[k] - closed_form(k)).norm() for n in (steps, 2 * steps))
    return float(torch.log2(coarse / fine))


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [
        ("euler", 1, 64),
        ("midpoint", 2, 32),
        ("heun", 2, 32),
        ("bosh3", 3, 32),
        ("rk4", 4, 32),
        ("rk4-38", 4, 32),
        ("dopri5", 5, 16),
    ],
)
def test_terms_by_evaluations_of_f_converge_at_the_order_of_the_solver(solver, order, steps):
    for k in (1, 2, 3):
        assert slope(solver, "evaluation", k, steps) == pytest.approx(order, abs=0.2)
    # The term of no evaluation is the cotangent, whatever the solver.
    assert torch.equal(terms(solver, steps, "evaluation", 4).parts[0], V)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_terms_by_steps_converge_at_order_1_whatever_the_solver(solver):
    for k in (2, 3):
        assert slope(solver, "step", k, 32) == pytest.approx(1.0, abs=0.1)


def test_the_terms_by_evaluations_of_rk4_are_near_the_closed_form_and_those_by_steps_are_not():
    near = terms("rk4", 32, "evaluation", 4).parts
    far = terms("rk4", 32, "step", 4).parts
    for k in (1, 2, 3, 4):
        size = closed_form(k).norm()
        assert (near[k] - closed_form(k)).norm() < 1e-6 * size
        assert (far[k] - closed_form(k)).norm() > 1e-3 * size


def test_one_step_of_rk4_by_hand():
    """h ↦ (I + zM + z²M²/2 + z³M³/6 + z⁴M⁴/24) h for dh/dt = A h, M = Δ A, of each of its steps."""

    class Constant(nn.Module):
        def forward(self, t, h):
            return h @ A.T

    found = spectrum.gradient(dynamics(ODEBlock(Constant(), "rk4", 1)), X, against_v, grade="evaluation")
    expected = [V @ torch.linalg.matrix_power(A, k) / math.factorial(k) for k in range(5)]
    torch.testing.assert_close(found.parts, torch.stack(expected), rtol=1e-13, atol=1e-14)


# Every chain of stages by itself


def field(seed=0):
    torch.manual_seed(seed)
    return Branch(3, Stack(norm="none", activation="tanh"), "mlp", "concat").double()


@pytest.mark.parametrize(("solver", "steps"), [*((s, 2) for s in TABLEAUX if s != "dopri8"), ("rk4", 3)])
def test_the_parts_are_the_sums_over_all_chains_of_stages(solver, steps):
    block = ODEBlock(field(), solver, steps)
    view = dynamics(block)
    found = spectrum.gradient(view, X, against_v, grade="evaluation")
    tableau, h, paths = TABLEAUX[solver], X, []
    with view.evaluation():
        for i in range(steps):
            paths.append(solver_ways(block.branch, tableau, i / steps, (i + 1) / steps, h))
            h = view.steps[i](h)
    expected = sums_over_paths(compressed(paths), V.flatten())
    longest = max(k for k, part in expected.items() if part.norm() > 0)
    assert len(found.parts) == len(found.counts) == longest + 1
    for k, part in enumerate(found.parts):
        torch.testing.assert_close(part.flatten(), expected[k], rtol=1e-12, atol=1e-14)
    # Each chain along which no coefficient is 0 is a path.
    assert found.counts == tuple(number_of_chains(paths).get(k, 0) for k in range(longest + 1))


def compressed(paths):
    """The ways through each step, with those of one length summed up."""
    found = []
    for ways in paths:
        sums = {}
        for k, matrix in ways:
            sums[k] = sums.get(k, 0) + matrix
        found.append(list(sums.items()))
    return found


def number_of_chains(paths):
    numbers = {0: 1}
    for ways in paths:
        before, numbers = numbers, {}
        for k, matrix in ways:
            if matrix.any():
                for j, number in before.items():
                    numbers[j + k] = numbers.get(j + k, 0) + number
    return numbers


def test_every_stage_of_dopri8_sums_to_the_gradient():
    block = ODEBlock(field(), "dopri8", 2)
    view = dynamics(block)
    found = spectrum.gradient(view, X, against_v, grade="evaluation")
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(against_v(block(x)), x)
    assert (found.total - expected).norm() <= 1e-13 * sum(part.norm() for part in found.parts)
    assert len(found.parts) == 2 * longest_chain(TABLEAUX["dopri8"]) + 1


def longest_chain(tableau):
    """Stages on the longest chain to the solution, recursively."""

    def before(i):
        return 1 + max((before(j) for j, a in enumerate(tableau.a[i]) if a != 0.0), default=0)

    return max(before(i) for i, b in enumerate(tableau.b) if b != 0.0)


# The two grades


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ralston", "rk4", "tsit5"])
def test_both_grades_sum_to_the_same(solver):
    view = dynamics(ODEBlock(field(), solver, 3))
    found = {grade: spectrum.gradient(view, X, against_v, grade=grade) for grade in ("step", "evaluation")}
    torch.testing.assert_close(found["step"].total, found["evaluation"].total, rtol=1e-12, atol=1e-13)
    assert torch.equal(found["step"].parts[0], found["evaluation"].parts[0])
    assert found["step"].counts == (1, 3, 3, 1)
    equal = torch.allclose(found["step"].parts, found["evaluation"].parts[:4], rtol=1e-6)
    assert equal == (solver == "euler")  # one evaluation a step


@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
@pytest.mark.parametrize("grade", ["step", "evaluation"])
def test_scaled_and_deleted_steps_of_a_solver(solver, grade):
    view = dynamics(ODEBlock(field(), solver, 3))
    changed = (scale(-0.5, 0) >> delete(1))(view)
    found = spectrum.gradient(changed, X, against_v, grade=grade)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(against_v(changed(x)), x)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-13)
    longest = 2 if grade == "step" else 2 * longest_chain(TABLEAUX[solver])
    assert len(found.parts) == longest + 1
    # What follows a solver's step, or goes round it, if somebody puts it there.
    steps = [replace(step, post=torch.sin, shortcut=lambda h: h @ A) for step in view.steps]
    changed = ResidualDynamics(view.stem, steps, view.head)
    found = spectrum.gradient(changed, X, against_v, grade=grade)
    (expected,) = torch.autograd.grad(against_v(changed(x)), x)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-13)
    around = V
    for step, h in reversed(list(zip(changed.steps, changed.states(X), strict=False))):
        total = step.sum(h).detach()
        around = (around.flatten() @ dense(torch.sin, total) @ dense(lambda h: h @ A, h)).view_as(h)
    torch.testing.assert_close(found.parts[0], around, rtol=1e-12, atol=1e-13)


def test_a_solvers_step_whose_branch_was_replaced_has_no_evaluations_to_tell_apart():
    view = noise(0.1, 1)(dynamics(ODEBlock(field(), "rk4", 3)))
    assert spectrum.gradient(view, X, against_v).counts == (1, 3, 3, 1)
    for analysis in (spectrum.gradient, spectrum.by_step, partial(spectrum.jvp, direction=X)):
        arguments = {} if isinstance(analysis, partial) else {"loss": against_v}
        with pytest.raises(InvalidInput, match=r"step '1 t=0.333' is a solver's step whose branch was replaced"):
            analysis(view, X, grade="evaluation", **arguments)


def test_an_adaptive_net_has_the_spectrum_of_the_steps_it_accepts():
    block = ODEBlock(field(), "dopri5", rtol=1e-6, atol=1e-6)
    view = dynamics(block, X)
    found = spectrum.gradient(view, X, against_v, grade="evaluation")
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(against_v(block(x)), x)
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)
    assert found.counts == lengths.counts(view, "evaluation")
    assert len(view.steps) > 1
