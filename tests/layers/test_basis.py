"""Bases in time: partitions of unity, what is smooth between breakpoints, and one answer for floats and tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.errors import InvalidInput
from resode.layers.basis import BASES, Basis, knots_of

BASIS = st.builds(
    Basis, st.sampled_from(BASES), st.integers(1, 40), st.floats(-3.0, 0.0), st.floats(0.1, 5.0, exclude_min=True)
)


def sparse(basis, t):
    found = torch.zeros(basis.knots, dtype=torch.float64)
    for k, value in basis.terms(t):
        found[k] += value
    return found


def dense(basis, t):
    return basis.values(torch.tensor(t, dtype=torch.float64))


@given(BASIS, st.floats(-10.0, 10.0))
@settings(deadline=None)
def test_floats_and_tensors_give_the_same_values(basis, t):
    torch.testing.assert_close(dense(basis, t), sparse(basis, t), rtol=0, atol=1e-7)


@given(BASIS, st.floats(0.0, 1.0))
@settings(deadline=None)
def test_pieces_and_hats_are_partitions_of_unity(basis, s):
    if basis.kind == "fourier":
        basis = Basis("linear", basis.knots)
    values = sparse(basis, basis.t0 + s * (basis.t1 - basis.t0))
    assert values.min() >= 0
    assert values.sum() == pytest.approx(1.0, abs=1e-15)
    assert len(basis.terms(s)) <= (1 if basis.kind == "constant" else 2)


@given(BASIS, st.floats(0.0, 10.0))
@settings(deadline=None)
def test_beyond_the_ends_they_are_as_at_the_ends(basis, far):
    for end, beyond in ((basis.t0, basis.t0 - far), (basis.t1, basis.t1 + far)):
        assert torch.equal(sparse(basis, beyond), sparse(basis, end))
        assert torch.equal(dense(basis, beyond), dense(basis, end))


@pytest.mark.parametrize("kind", BASES)
def test_one_function_is_the_constant(kind):
    for t in (0.0, 0.3, 1.0):
        assert dense(Basis(kind, 1), t).tolist() == sparse(Basis(kind, 1), t).tolist() == [1.0]
    assert Basis(kind, 1).breakpoints == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_block_l_of_any_number_of_blocks_has_piece_l(dtype):
    """The product (l/L)·L is below l for some (1/49·49 for one), which must not give it the piece before."""
    for count in range(1, 201):
        basis = Basis("constant", count)
        assert [basis.terms(i / count) for i in range(count)] == [[(i, 1.0)] for i in range(count)]
        if count % 10 == 9:
            found = [basis.values(torch.tensor(i / count, dtype=dtype)).argmax() for i in range(count)]
            assert found == list(range(count))


def test_breakpoints_are_ends_of_pieces_and_inner_knots():
    assert Basis("constant", 4).breakpoints == (0.25, 0.5, 0.75)
    assert Basis("linear", 5).breakpoints == (0.25, 0.5, 0.75)
    assert Basis("linear", 2).breakpoints == ()
    assert Basis("fourier", 5).breakpoints == ()
    assert Basis("constant", 2, -1.0, 3.0).breakpoints == (1.0,)


@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("knots", [2, 5, 8])
def test_the_functions_jump_or_bend_at_the_breakpoints_and_nowhere_else(kind, knots):
    n = 840  # a multiple of every number of pieces
    values = torch.stack([dense(Basis(kind, knots), i / n) for i in range(n + 1)])
    bends = (values[2:] - 2 * values[1:-1] + values[:-2]).abs().amax(1)
    rough = [(i + 1) / n for i, bend in enumerate(bends) if bend > 1e-9]
    points = Basis(kind, knots).breakpoints
    assert all(any(abs(t - point) < 1.5 / n for t in rough) for point in points)
    assert all(any(abs(t - point) < 1.5 / n for point in points) for t in rough)


def test_the_fourier_basis_is_orthonormal_and_its_ends_are_free():
    basis = Basis("fourier", 9)
    values = torch.stack([dense(basis, (i + 0.5) / 64) for i in range(64)])
    torch.testing.assert_close(values.T @ values / 64, torch.eye(9, dtype=torch.float64), atol=1e-14, rtol=0)
    assert not torch.allclose(dense(basis, 0.0), dense(basis, 1.0))


def test_the_gradient_in_time_is_the_derivative():
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Basis("linear", 5).values(t)[1], t)
    assert slope == pytest.approx(-4.0)


def test_the_values_of_a_batched_time_are_never_asked_for():
    t = torch.linspace(-0.2, 1.2, 9, dtype=torch.float64)
    for kind in BASES:
        basis = Basis(kind, 4)
        expected = torch.stack([dense(basis, float(x)) for x in t])
        torch.testing.assert_close(torch.func.vmap(basis.values)(t), expected)


def test_a_linear_basis_has_one_knot_more_than_pieces():
    assert [knots_of(kind, 6) for kind in BASES] == [6, 7, 6]
    for kind in ("constant", "linear"):
        assert len(Basis(kind, knots_of(kind, 6)).breakpoints) == 5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("cubic", 4), "unknown basis 'cubic': choose from constant, linear, fourier"),
        (("constant", 0), "knots is 0"),
        (("linear", 2.0), r"knots is 2\.0"),
        (("constant", 4, 1.0, 1.0), "from t0 = 1 to t1 = 1"),
        (("constant", 4, 0.0, float("inf")), "both finite"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Basis(*settings)
