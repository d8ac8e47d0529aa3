"""For a linear model and the squared error, noise and dropout on the input are quadratic penalties: in closed form."""

import itertools
import math

import pytest
import torch
from torch import nn

import resode.layers.noise
from resode.layers import Dropout
from resode.layers.noise import GaussianNoise
from resode.stack import Stack

N, D, OUT, SIGMA = 12, 4, 3, 0.7


@pytest.fixture
def problem():
    """X of shape (N, D), Y of shape (N, OUT), and a model W, all at random."""
    generator = torch.Generator().manual_seed(0)
    X, Y, W = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (N, OUT), (OUT, D)))
    return X, Y, W


def model_of(first, W):
    """W after a layer, in training mode."""
    linear = nn.Linear(D, OUT, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(W)
    return nn.Sequential(first, linear).train()


def sum_of_squares(model, X, Y):
    return (model(X) - Y).square().sum()


def expected_under_noise(model, X, Y, monkeypatch):
    """E of the sum of squares over the noise of ``model``, exactly, by a rule that is exact for quadratics.

    The 2D points ±√D e_i have mean 0 and covariance I; each in its turn is what the layer draws, for all samples.
    """
    total = 0.0
    for i, sign in itertools.product(range(D), (1.0, -1.0)):
        point = torch.zeros(D, dtype=X.dtype)
        point[i] = sign * math.sqrt(D)
        with monkeypatch.context() as patched:
            patched.setattr(resode.layers.noise.torch, "randn_like", lambda x, point=point: point.expand_as(x))
            total = total + sum_of_squares(model, X, Y)
    return total / (2 * D)


def test_noise_on_the_input_adds_the_squared_norm_of_the_weights_to_the_expected_loss(problem, monkeypatch):
    """Bishop 1995: E ‖W(x + σε) − y‖² = ‖W x − y‖² + σ²‖W‖², for each of the N samples."""
    X, Y, W = problem
    model = model_of(Stack(input_noise=SIGMA).input_layer(), W)
    plain = (X @ W.T - Y).square().sum()
    found = expected_under_noise(model, X, Y, monkeypatch)
    torch.testing.assert_close(found.detach(), plain + N * SIGMA**2 * W.square().sum(), rtol=1e-13, atol=0.0)


def test_and_so_it_is_of_normal_draws_within_their_error(problem):
    X, Y, W = problem
    draws = 20_000
    torch.manual_seed(0)
    model = model_of(GaussianNoise(SIGMA), W)
    with torch.no_grad():
        values = (model(X.expand(draws, N, D)) - Y).square().sum((1, 2))
    error = float(values.std()) / math.sqrt(draws)
    penalty = N * SIGMA**2 * float(W.square().sum())
    assert error < 0.01 * penalty, "the penalty would not be seen"
    assert float(values.mean()) == pytest.approx(float((X @ W.T - Y).square().sum()) + penalty, abs=4.5 * error)


def test_the_minimum_under_noise_is_that_of_ridge_regression(problem, monkeypatch):
    """With λ = Nσ² for the sum of squares: the expected loss has no slope there, and a positive definite Hessian."""
    X, Y, _ = problem
    ridge = torch.linalg.solve(X.T @ X + N * SIGMA**2 * torch.eye(D, dtype=X.dtype), X.T @ Y).T
    model = model_of(GaussianNoise(SIGMA), ridge)
    loss = expected_under_noise(model, X, Y, monkeypatch)
    (slope,) = torch.autograd.grad(loss, model[1].weight)
    assert float(slope.abs().max()) < 1e-12
    # Not so of least squares.
    model = model_of(GaussianNoise(SIGMA), torch.linalg.lstsq(X, Y).solution.T)
    (slope,) = torch.autograd.grad(expected_under_noise(model, X, Y, monkeypatch), model[1].weight)
    assert float(slope.abs().max()) > 1.0


def test_least_squares_on_many_noisy_copies_comes_to_ridge_regression(problem):
    X, Y, _ = problem
    copies = 20_000
    torch.manual_seed(1)
    noisy = GaussianNoise(SIGMA)(X.expand(copies, N, D)).reshape(-1, D)
    found = torch.linalg.lstsq(noisy, Y.repeat(copies, 1)).solution
    ridge = torch.linalg.solve(X.T @ X + N * SIGMA**2 * torch.eye(D, dtype=X.dtype), X.T @ Y)
    plain = torch.linalg.lstsq(X, Y).solution
    assert float((found - ridge).norm()) < 0.02 * float((plain - ridge).norm())


@pytest.mark.parametrize("inverted", [False, True])
def test_dropout_on_the_input_is_ridge_regression_in_units_of_the_inputs(problem, inverted):
    """Srivastava et al. 2014, section 9.1: E ‖y − (R ⊙ X)w‖² = ‖y − q X w‖² + q(1 − q) ‖Γ w‖², Γ² = diag(XᵀX).

    R keeps each element with probability q. The expectation is exact: all 2^(N·D) masks come to those of one sample at
    a time, since the samples' errors add.
    """
    X, Y, W = problem
    p = 0.3
    q = 1.0 - p
    layer = Dropout(p, "unit", inverted)
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=D)), dtype=torch.float64)
    chances = q ** masks.sum(1) * p ** (D - masks.sum(1))
    expected = 0.0
    for mask, chance in zip(masks, chances, strict=True):
        drawn = X * mask / (q if inverted else 1.0)
        expected = expected + chance * (drawn @ W.T - Y).square().sum()
    scaled = W / q if inverted else W  # inverted dropout is the other with weights W/q
    gamma = X.square().sum(0).sqrt()
    closed = (q * X @ scaled.T - Y).square().sum() + q * p * (scaled * gamma).square().sum()
    torch.testing.assert_close(expected, closed, rtol=1e-13, atol=0.0)
    draws = 20_000
    torch.manual_seed(2)
    with torch.no_grad():
        values = (model_of(layer, W)(X.expand(draws, N, D)) - Y).square().sum((1, 2))
    error = float(values.std()) / math.sqrt(draws)
    assert float(values.mean()) == pytest.approx(float(closed), abs=4.5 * error)
