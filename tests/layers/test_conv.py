"""Convolutions and linear maps: the time channel, standardized weights, DropConnect, in every gradient mode."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resode.layers.conv as conv
from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.errors import InvalidInput
from resode.layers.context import evaluate
from resode.layers.conv import Conv2d, Linear, standardize_weight, time_map


def images(b=3, c=4, h=9, w=8, seed=0):
    return torch.randn(b, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Field(nn.Module):
    """f(t, h) = tanh(layer(h, t)), the layer given t as a branch gives it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, t, h):
        return torch.tanh(self.layer(h, t))


# --- time ------------------------------------------------------------------------------------------------------------


def concatenated(layer, x, t):
    """The convolution of [t·1, h] by [W_t, W_h], as it is defined."""
    t = torch.as_tensor(t, dtype=x.dtype)
    channel = torch.ones_like(x[:, :1]) * t
    weight = torch.cat([layer.time_weight, layer.weight], 1)
    return F.conv2d(torch.cat([channel, x], 1), weight, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_time_map_is_the_concatenation(kernel, stride, padding, bias):
    layer = Conv2d(4, 5, kernel, stride=stride, padding=padding, bias=bias, time=True).double()
    x, twin = images().requires_grad_(), images().requires_grad_()
    for t in (0.0, 0.37, torch.tensor(0.81)):
        ours, theirs = layer(x, t), concatenated(layer, twin, t)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn_like(ours)
        grads = torch.autograd.grad(ours, (x, *layer.parameters()), cotangent)
        expected = torch.autograd.grad(theirs, (twin, *layer.parameters()), cotangent)
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_the_time_map_shows_the_borders():
    """Where the padding shows, fewer ones are summed."""
    K = time_map(torch.ones(1, 1, 3, 3), (4, 5), padding=(1, 1))
    assert K[0, 0].tolist() == [[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]]


def test_a_depthwise_convolution_takes_time_once_for_each_output():
    layer = Conv2d(4, 4, 3, groups=4, time=True).double()
    without = F.conv2d(images(), layer.weight, layer.bias, padding=1, groups=4)
    expected = without + 0.3 * F.conv2d(torch.ones(1, 1, 9, 8, dtype=torch.float64), layer.time_weight, padding=1)
    torch.testing.assert_close(layer(images(), 0.3), expected)


@pytest.mark.parametrize("t", [0.0, 0.3, torch.tensor(0.7)])
def test_a_linear_map_takes_time_as_one_more_input(t):
    layer = Linear(4, 5, time=True).double()
    x = images()[:, :, 0, 0]
    column = torch.ones(3, 1, dtype=torch.float64) * torch.as_tensor(t, dtype=torch.float64)
    expected = F.linear(torch.cat([x, column], 1), torch.cat([layer.weight, layer.time_weight], 1), layer.bias)
    torch.testing.assert_close(layer(x, t), expected)


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_time_that_is_a_tensor_is_not_rounded(dtype, t):
    layer = Conv2d(1, 64, 3, bias=False, time=True).to(dtype)
    out = layer(torch.zeros(1, 1, 5, 5, dtype=dtype), t)
    K = time_map(layer.time_weight.detach(), (5, 5), padding=(1, 1))
    assert out.dtype == dtype
    assert torch.equal(out, (0.3 * K.double()).float().to(dtype))


@pytest.mark.parametrize("layer", [Conv2d(4, 4, 3), Linear(4, 4)])
def test_without_time_there_is_no_time(layer):
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(layer(x, 0.0), layer(x, 0.9))
    assert layer.time_weight is None
    assert all("time" not in name for name in layer.state_dict())


@pytest.mark.parametrize("make", [lambda: Conv2d(8, 64, 3, time=True), lambda: Linear(72, 64, time=True)])
def test_the_time_weights_start_at_the_scale_of_the_others(make):
    torch.manual_seed(0)
    layer = make()
    time, weight = layer.time_weight.detach(), layer.weight.detach()
    assert time.std().item() == pytest.approx(weight.std().item(), rel=0.2)


class Counts:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize(
    ("name", "options"), [("time_map", {"time": True}), ("standardize_weight", {"standardized": True})]
)
def test_what_depends_on_the_weights_alone_is_computed_once_a_solve(monkeypatch, solver, gradient, name, options):
    counts = Counts(getattr(conv, name))
    monkeypatch.setattr(conv, name, counts)
    block = ODEBlock(
        Field(Conv2d(4, 4, 3, **options).double()), solver, steps=None if solver == "dopri5" else 3, gradient=gradient
    )
    for solves in (1, 2):
        block(images()).sum().backward()
        assert counts.calls == solves
    block.trajectory(images(), [0.0, 0.3, 1.0]).sum().backward()
    assert counts.calls == 3


def test_two_image_sizes_in_one_evaluation_have_two_maps():
    class TwoSizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Conv2d(4, 4, 3, time=True).double()

        def forward(self, t, h):
            small = self.layer(h[..., ::2, ::2], t)
            return self.layer(h, t) + small.mean((2, 3), keepdim=True)

    field, x = TwoSizes(), images()
    layer = field.layer
    expected = concatenated(layer, x, 0.4) + concatenated(layer, x[..., ::2, ::2], 0.4).mean((2, 3), keepdim=True)
    torch.testing.assert_close(evaluate(field, 0.4, x), expected)


# --- standardized weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 1, 7, 7), (5, 9), (1, 2, 1, 1)])
def test_standardized_weights_have_mean_zero_and_variance_one_over_fan_in(shape):
    weight = standardize_weight(3.0 * torch.randn(shape, dtype=torch.float64) + 2.0).flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros_like(weight[:, 0]))
    fan_in = weight.shape[1]
    torch.testing.assert_close(fan_in * weight.var(1, correction=0), torch.ones_like(weight[:, 0]), rtol=1e-5, atol=0)


def test_standardized_weights_do_not_see_affine_changes():
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    scale = torch.tensor([0.1, 1, 3, 10, 100], dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        standardize_weight(scale * weight - 7.0), standardize_weight(weight), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(standardize_weight(-weight), -standardize_weight(weight))


def test_a_white_input_of_variance_one_gives_an_output_of_variance_one():
    torch.manual_seed(0)
    layer = Conv2d(16, 8, 3, padding=0, bias=False, standardized=True)
    with torch.no_grad():
        layer.weight.mul_(5.0).add_(1.0)
    assert layer(torch.randn(32, 16, 16, 16)).var().item() == pytest.approx(1.0, abs=0.03)


def test_the_gradient_of_standardized_weights_is_orthogonal_to_scale_and_shift():
    """The output does not change along W and along 1, so the gradient has no part there."""
    layer = Conv2d(4, 5, 3, standardized=True).double()
    layer(images()).square().sum().backward()
    grad, weight = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)
    size = grad.norm(dim=1)
    assert (grad.sum(1).abs() < 1e-8 * size).all()
    assert ((grad * weight).sum(1).abs() < 1e-5 * size).all()


@pytest.mark.parametrize("options", [{"standardized": True}, {"scaled": True}])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 4)])
def test_standardized_filters_of_one_weight_are_refused(channels, groups, options):
    with pytest.raises(InvalidInput, match=f"1×1 convolution from {channels} channels.*one weight"):
        Conv2d(channels, 4, 1, groups=groups, **options)
    Conv2d(channels, 4, 1, groups=groups)
    Conv2d(channels, 4, 3, groups=groups, **options)


# --- DropConnect -----------------------------------------------------------------------------------------------------


def used_weight(layer):
    """The weights a linear layer used in one call, read off its output."""
    return layer(torch.eye(layer.in_features)).T.detach()


def test_dropconnect_drops_each_weight_with_probability_p():
    torch.manual_seed(0)
    layer, n, p = Linear(20, 10, bias=False, dropconnect=0.3), 2000, 0.3
    hits = sum((used_weight(layer) == 0).double() for _ in range(n))
    assert ((hits - n * p).abs() / math.sqrt(n * p * (1 - p))).max() < 5.0


@pytest.mark.parametrize("inverted", [True, False])
def test_dropconnect_expects_in_training_what_evaluation_gives(inverted):
    torch.manual_seed(0)
    layer, n = Linear(20, 10, bias=False, dropconnect=0.3, inverted=inverted), 4000
    mean = sum(used_weight(layer) for _ in range(n)) / n
    kept = layer.weight.detach() / 0.7 if inverted else layer.weight.detach()
    assert ((mean - used_weight(layer.eval())).abs() <= 5.0 * kept.abs() * math.sqrt(0.21 / n)).all()
    assert torch.equal(used_weight(layer), layer.weight) == inverted


def test_dropconnect_shares_its_mask_over_the_batch_and_keeps_bias_and_time():
    torch.manual_seed(0)
    layer = Conv2d(4, 8, 3, time=True, dropconnect=0.999).double()
    x = images(b=2, seed=1)[:1].expand(4, -1, -1, -1)
    out = layer(x, 0.5)
    assert torch.equal(out, out[:1].expand_as(out))
    dropped = layer(torch.zeros_like(x), 0.5)
    full = F.conv2d(torch.full((1, 1, 9, 8), 0.5, dtype=torch.float64), layer.time_weight, layer.bias, padding=1)
    torch.testing.assert_close(dropped, full.expand_as(dropped))


def test_dropconnect_drops_standardized_weights():
    torch.manual_seed(0)
    layer = Conv2d(4, 5, 1, bias=False, standardized=True, dropconnect=0.5).double()
    kept = layer(torch.eye(4, dtype=torch.float64)[:, :, None, None])[:, :, 0, 0].T
    expected = standardize_weight(layer.weight)[:, :, 0, 0] / 0.5
    on = kept != 0
    torch.testing.assert_close(kept[on], expected[on])
    assert 0 < on.sum() < on.numel()


class Noted(Linear):
    """Notes the weights of each evaluation."""

    def effective_weight(self):
        weight = super().effective_weight()
        self.__dict__.setdefault("noted", []).append(weight.detach().clone())
        return weight


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_dropconnect_is_drawn_once_a_solve_or_interval(gradient):
    torch.manual_seed(0)
    layer = Noted(6, 6, dropconnect=0.5).double()
    block = ODEBlock(Field(layer), "rk4", steps=4, gradient=gradient)
    x = images(c=6)[:, :, 0, 0]
    block(x).sum().backward()
    first = list(layer.noted)
    assert len(first) >= 16
    assert all(torch.equal(w, first[0]) for w in first)
    layer.noted.clear()
    block(x)
    assert not torch.equal(layer.noted[0], first[0])
    layer.noted.clear()
    ODEBlock(Field(layer), "rk4", steps=4, gradient=gradient, mask_intervals=2)(x).sum().backward()
    halves = layer.noted[:8], layer.noted[8:16], layer.noted[16:24], layer.noted[24:32]
    for half in halves:
        assert all(torch.equal(w, half[0]) for w in half)
    assert not torch.equal(halves[0][0], halves[1][0])
    if gradient == "adjoint":  # backwards through the same two
        assert torch.equal(halves[2][0], halves[1][0])
        assert torch.equal(halves[3][0], halves[0][0])


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("change", [nn.Module.eval, nn.Module.train])
def test_a_backward_solve_drops_as_its_forward_solve_did_whatever_the_mode_is_by_then(gradient, change):
    def found(after):
        torch.manual_seed(0)
        block = ODEBlock(Field(Linear(6, 6, dropconnect=0.5).double()), "rk4", steps=4, gradient=gradient)
        block.train(change is nn.Module.eval)
        out = block(images(c=6)[:, :, 0, 0])
        after(block)
        return torch.autograd.grad(out.square().sum(), tuple(block.parameters()))

    for a, b in zip(found(lambda block: None), found(change), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_dropconnect_outside_its_range_is_refused(p):
    for make in (lambda: Conv2d(2, 2, 3, dropconnect=p), lambda: Linear(2, 2, dropconnect=p)):
        with pytest.raises(InvalidInput, match=r"dropconnect p .* \[0, 1\)"):
            make()


# --- gradients through a solve ---------------------------------------------------------------------------------------

OPTIONS = {
    "time": {"time": True},
    "standardized": {"standardized": True},
    "dropconnect": {"dropconnect": 0.3},
    "not inverted": {"dropconnect": 0.3, "inverted": False},
    "all": {"time": True, "standardized": True, "dropconnect": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_derived_tensors_pass_gradients_in_every_mode(options):
    torch.manual_seed(0)
    layer = Conv2d(4, 4, 3, **options).double()

    def gradients(gradient):
        torch.manual_seed(1)
        x = images().requires_grad_()
        out = ODEBlock(Field(layer), "rk4", steps=24, gradient=gradient, mask_intervals=2)(x)
        return torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))

    for a, b in zip(gradients("backprop"), gradients("adjoint"), strict=True):
        assert a.norm() > 0
        assert (a - b).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_euler_step_is_a_residual_block_and_differentiates_as_one(options):
    layer = Conv2d(4, 4, 3, **options).double()
    found = []
    for block in (ODEBlock(Field(layer), "euler", steps=1), ResidualBlock(Field(layer))):
        torch.manual_seed(0)
        out = block(images())
        found.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_repr_says_the_options():
    text = repr(Conv2d(2, 2, 3, time=True, standardized=True, dropconnect=0.25))
    assert all(said in text for said in ("time=True", "standardized=True", "dropconnect=0.25"))
    assert "dropconnect" not in repr(Linear(2, 2))
