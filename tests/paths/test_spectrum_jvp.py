"""The response of the logits by lengths of paths: the transpose of the gradient's spectrum, part by part."""

import pytest
import torch
import torch.nn.functional as F
from test_spectrum import GRADES, NETS, X, batch, by_hand, net_of
from torch import nn

from resode import Branch, InvalidInput, NetConfig, ResidualBlock, ResidualDynamics, Stack, Step, build, dynamics
from resode.paths import spectrum


def direction(x, seed=7):
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def assert_transposed(view, x, grade="step", most=None, at=None, **how):
    """⟨v, part_k of the response to u⟩ = ⟨part_k of the gradient pulled back from v, u⟩ for each k."""
    with view.evaluation():
        u = direction(x if at is None else list(view.states(x))[at])
        v = direction(view(x), 8)
    response = spectrum.jvp(view, x, u, most, grade, at, **how)
    gradient = spectrum.gradient(view, x, lambda z: (v * z).sum(), most, grade, at)
    assert response.parts.shape == (len(gradient.parts), *v.shape)
    assert (response.counts, response.grade) == (gradient.counts, gradient.grade)
    pairs = list(zip(response.parts, gradient.parts, strict=True))
    if most is not None and most < len(response.counts) - 1:
        pairs.append((response.rest, gradient.rest))
    else:
        assert response.rest is gradient.rest is None
    size = sum(float(part.norm()) for part in gradient.parts) * float(u.norm())
    for pushed, pulled in pairs:
        assert float((v * pushed).sum()) == pytest.approx(float((pulled * u).sum()), abs=1e-13 * size)
    return response


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", NETS)
def test_the_parts_of_the_response_are_the_transposes_of_those_of_the_gradient(name, grade):
    net, x = net_of(name), batch(name, 2)
    view = dynamics(net)
    response = assert_transposed(view, x, grade)
    assert all(part.any() for part, count in zip(response.parts, response.counts, strict=True) if count)


@pytest.mark.parametrize("kind", ["convnext", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "layer", "pixel", "instance", "group", "none"])
def test_every_norm_and_activation(norm, kind):
    activation = {"batch": "relu", "layer": "gelu", "pixel": "silu", "instance": "elu"}.get(norm, "tanh")
    stack = Stack(norm=norm, activation=activation)
    config = NetConfig(net="resnet", depth=8, width=8, channels=2, size=(8, 8), kind=kind, classes=3, stack=stack)
    net, x = build(config, seed=0).double(), torch.rand(2, 2, 8, 8, dtype=torch.float64)
    assert_transposed(dynamics(net), x, together=2)


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", ["basic", "midpoint", "rk4"])
def test_fewer_lengths_other_states_and_shared_passes(name, grade):
    net, x = net_of(name), batch(name, 2)
    view = dynamics(net)
    assert_transposed(view, x, grade, most=2)
    assert_transposed(view, x, grade, at=2)
    assert_transposed(view, x, grade, at=len(view.steps))
    assert_transposed(view, x, grade, most=1, together=4)


def test_the_parts_sum_to_the_derivative_along_the_direction():
    """Against differences of fourth order."""
    view, _ = by_hand(scale=0.5, post=lambda h: h + h.cos())
    u, e = direction(X), 1e-3
    expected = (8 * (view(X + e * u) - view(X - e * u)) - (view(X + 2 * e * u) - view(X - 2 * e * u))) / (12 * e)
    torch.testing.assert_close(spectrum.jvp(view, X, u).total, expected, rtol=1e-9, atol=1e-9)


class Attention(nn.Module):
    """A branch with torch's attention."""

    def __init__(self, fused):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fused = fused

    def forward(self, t, h):
        if self.fused:
            return F.scaled_dot_product_attention(h, h, 2.0 * h)
        return self.heads(h, h, h, need_weights=False)[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("together", [1, 3])
def test_attention_whose_fused_kernels_cannot_be_differentiated_twice(fused, together):
    torch.manual_seed(0)
    model = nn.Sequential(*[ResidualBlock(Attention(fused)) for _ in range(3)], nn.Linear(4, 2)).double()
    x = torch.rand(2, 5, 4, dtype=torch.float64)
    assert_transposed(dynamics(model), x, together=together)
    one = spectrum.gradient(dynamics(model), x, torch.sum)
    found = spectrum.gradient(dynamics(model), x, torch.sum, together=together)
    torch.testing.assert_close(found.parts, one.parts, rtol=1e-10, atol=1e-12)


def test_branches_without_a_derivative_take_no_path():
    constant = Step(kind="residual", branch=lambda t, h: torch.ones_like(h))
    signs = Step(kind="residual", branch=lambda t, h: h.sign())
    linear = Step(kind="residual", branch=lambda t, h: 2.0 * h)
    view = ResidualDynamics(lambda x: x, [constant, linear, signs, linear], lambda h: 3.0 * h)
    response = spectrum.jvp(view, X, X)
    torch.testing.assert_close(response.parts, torch.stack([3 * X, 12 * X, 12 * X, 0 * X, 0 * X]))


def test_a_direction_of_another_shape_is_refused():
    view, _ = by_hand()
    with pytest.raises(InvalidInput, match=r"direction is of shape \(2,\), and what it perturbs is of shape \(2, 3\)"):
        spectrum.jvp(view, X, X[:, 0])
    with pytest.raises(InvalidInput, match="at is 9"):
        spectrum.jvp(view, X, X, at=9)


def test_a_branch_that_would_be_broadcast_is_refused():
    wrong = Step(kind="residual", branch=lambda t, h: h.sum(1, keepdim=True))
    view = ResidualDynamics(lambda x: x, [wrong], lambda h: h)
    with pytest.raises(InvalidInput, match=r"the branch gives \(2, 1\) and the shortcut \(2, 3\)"):
        spectrum.jvp(view, X, X)


def test_a_direction_of_another_type_is_taken_to_that_of_the_state():
    branch = Branch(3, Stack(norm="none"), "mlp").double()
    view = dynamics(ResidualBlock(branch))
    found = spectrum.jvp(view, X, torch.ones(2, 3))
    assert torch.equal(found.parts, spectrum.jvp(view, X, torch.ones_like(X)).parts)
