"""Rows of functions of t on other grids: the same functions, and what belongs to them by the weight of a row."""

import pytest
import torch

from resode import InvalidInput
from resode.layers.basis import Basis
from resode.nets.resample import Coarser, Finer, mean


def rows(count, *shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value(held, kind, t):
    return sum(weight * held[k] for k, weight in Basis(kind, len(held)).terms(t))


@pytest.mark.parametrize("r", [2, 3, 4])
@pytest.mark.parametrize(("kind", "count"), [("constant", 3), ("constant", 1), ("linear", 4), ("linear", 1)])
def test_values_are_those_of_the_same_function(kind, count, r):
    coarse = rows(count, 2, 3)
    fine = Finer(r).rows(coarse, kind, 0)
    assert len(fine) == (r * count if kind == "constant" else r * (count - 1) + 1)
    for t in (*torch.rand(20, generator=torch.Generator().manual_seed(1)).tolist(), 0.0, 1.0):
        torch.testing.assert_close(value(fine, kind, t), value(coarse, kind, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [2, 4])
@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize(("kind", "count"), [("constant", 3), ("linear", 4), ("linear", 1), ("fourier", 3)])
def test_back_on_the_coarser_grid_they_are_the_same_to_the_last_bit(kind, count, power, r):
    coarse = rows(count, 2)
    assert torch.equal(Coarser(r).rows(Finer(r).rows(coarse, kind, power), kind, power), coarse)


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize(("kind", "count"), [("constant", 5), ("linear", 6)])
def test_a_gradient_is_that_of_the_finer_rows(kind, count, r):
    """Of the loss ∫ g(t)·θ(t) dt: its rows are ∫ g φ_k dt, here for a g that is linear in t, by exact quadrature."""

    def gradient(knots):
        held = torch.zeros(knots, dtype=torch.float64, requires_grad=True)
        points = 6000  # a multiple of all numbers of pieces: midpoints are exact for what is linear on each
        basis = Basis(kind, knots)
        loss = 0.0
        for i in range(0, points, 10):
            t = (i + 5) / points
            loss = loss + (1.0 + 0.5 * t) * sum(w * held[k] for k, w in basis.terms(t)) / (points / 10)
        return torch.autograd.grad(loss, held)[0]

    fine = r * count if kind == "constant" else r * (count - 1) + 1
    carried = Finer(r).rows(gradient(count), kind, 1)
    assert float((carried - gradient(fine)).norm() / gradient(fine).norm()) < 0.03
    squares = Finer(r).rows(gradient(count).square(), kind, 2)
    assert float((squares - carried.square()).norm() / squares.norm()) < 0.01


def test_coefficients_of_a_spectral_basis_stay():
    held = rows(4, 2)
    for change in (Finer(2), Coarser(2)):
        assert torch.equal(change.rows(held, "fourier", 1), held)


def test_times_come_between_times():
    times = [0.0, 0.3, 1.0]
    fine = Finer(3).times(times)
    assert fine == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1.0])
    assert Coarser(3).times(fine) == times
    assert Finer(3).times([0.5]) == Coarser(3).times([0.5]) == [0.5]


def test_counts_are_multiplied_and_divided():
    assert Finer(3).count(4, "steps") == 12
    assert Coarser(3).count(12, "steps") == 4
    with pytest.raises(InvalidInput, match="4 steps cannot be made 3 times fewer: a multiple of 3 is expected"):
        Coarser(3).count(4, "steps")
    with pytest.raises(InvalidInput, match="3 intervals between the knots"):
        Coarser(2).times([0.0, 0.1, 0.2, 0.3])


def test_the_mean_of_equal_values_is_that_value_to_the_last_bit():
    value = torch.tensor([0.1, 1e-30, 1e30, 1 / 3], dtype=torch.float64)
    for n in (2, 3, 5, 7):
        assert torch.equal(mean([value] * n), value)
    parts = list(rows(5, 3).unbind())
    torch.testing.assert_close(mean(parts), torch.stack(parts).mean(0))
