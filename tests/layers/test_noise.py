"""Gaussian noise: its moments, when it acts, that a solve has one draw of it; and where it stands in a net."""

import copy
import math

import pytest
import torch
from torch import nn

from resode import InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack, build
from resode.blocks import compiled as compiled_steps
from resode.blocks.settings import GRADIENTS
from resode.layers.noise import GaussianNoise
from resode.nets.config import NETS
from resode.stack import Dropout

SIGMA = 0.5


class Decay(nn.Module):
    """f(t, h) = −(h + σε): with one ε for all of a solve, e^{−t} h − (1 − e^{−t}) σε."""

    def __init__(self):
        super().__init__()
        self.noise = GaussianNoise(SIGMA)
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t, h):
        return -self.rate * self.noise(h)


def state():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# --- the layer -------------------------------------------------------------------------------------------------------


def test_noise_is_normal_independent_and_of_deviation_sigma():
    torch.manual_seed(0)
    n = 40_000
    added = GaussianNoise(SIGMA)(torch.full((n, 2, 3), 7.0, dtype=torch.float64)).flatten(1) - 7.0
    assert float((added.mean(0) / (SIGMA / math.sqrt(n))).abs().max()) < 5.0
    covariance = added.T @ added / n
    spread = SIGMA**2 * (1.0 + torch.eye(6)).sqrt() / math.sqrt(n)
    assert float(((covariance - SIGMA**2 * torch.eye(6)) / spread).abs().max()) < 5.0
    # The fourth moment of a normal number is 3, with variance 105 − 9.
    fourth = (added / SIGMA).pow(4).mean()
    assert abs(float(fourth) - 3.0) < 5.0 * math.sqrt(96 / added.numel())


def test_each_call_draws_anew_and_the_seed_decides():
    layer, x = GaussianNoise(SIGMA), state()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    torch.testing.assert_close(first, x + SIGMA * torch.randn_like(x), rtol=0.0, atol=1e-15)


def test_evaluation_and_a_sigma_of_zero_change_nothing():
    x = state()
    assert GaussianNoise(SIGMA).eval()(x) is x
    assert GaussianNoise(0.0)(x) is x


def test_the_gradient_passes_as_it_is():
    x = state().requires_grad_()
    (out,) = torch.autograd.grad(GaussianNoise(SIGMA)(x), x, torch.ones_like(x))
    assert torch.equal(out, torch.ones_like(x))


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan])
def test_a_sigma_that_is_no_deviation_is_refused(sigma):
    for make in (lambda: GaussianNoise(sigma), lambda: Stack(input_noise=sigma)):
        with pytest.raises(InvalidInput, match=f"noise is {sigma}: a finite number of at least 0"):
            make()


# --- inside a solve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_solve_has_one_draw_for_all_its_evaluations_those_of_the_backward_pass_included(gradient):
    block, x = ODEBlock(Decay(), "rk4", steps=16, gradient=gradient), state().requires_grad_()
    torch.manual_seed(2)
    out = block(x)
    noise = SIGMA * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    share = math.exp(-1.0)
    expected = share * x.detach() - (1.0 - share) * noise
    torch.testing.assert_close(out.detach(), expected, rtol=0.0, atol=1e-6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, share), rtol=0.0, atol=1e-6)
    slope = -share * (x.detach() + noise).sum()  # of e^{−r} x − (1 − e^{−r}) σε by the rate r, at r = 1
    torch.testing.assert_close(block.branch.rate.grad, slope, rtol=0.0, atol=1e-5)


def test_mask_intervals_have_a_draw_each():
    block, seen = ODEBlock(Decay(), "euler", steps=4, mask_intervals=2), []
    noise = block.branch.noise
    noise.register_forward_hook(lambda layer, inputs, out: seen.append((out - inputs[0]).detach()))
    block(state())
    assert len(seen) == 4
    for same, other in ((0, 1), (2, 3)):
        torch.testing.assert_close(seen[same], seen[other], rtol=0.0, atol=1e-14)
    assert float((seen[0] - seen[2]).abs().min()) > 1e-4


def test_a_residual_block_has_one_draw_a_forward_pass():
    block, x = ResidualBlock(Decay()), state()
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    torch.testing.assert_close(out, -SIGMA * torch.randn_like(x), rtol=0.0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compiled_steps_have_the_draw_of_their_solve(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(compiled_steps.torch, "compile", lambda graph, **_: real(graph, backend="eager"))
    plain = ODEBlock(Decay(), "rk4", steps=4)
    compiled = copy.deepcopy(plain)
    compiled.compile_mode = "default"
    torch._dynamo.reset()
    for seed in (1, 2):
        outs = []
        for block in (plain, compiled):
            torch.manual_seed(seed)
            outs.append(block(state()))
        torch.testing.assert_close(*outs, rtol=0.0, atol=1e-12)


# --- at the input of a net -------------------------------------------------------------------------------------------


def net_of(net, **stack):
    size = (32, 32) if net == "alexnet" else (16, 16)
    config = NetConfig(
        net=net, depth=8, width=4, blocks=2, channels=2, size=size, steps=1, stack=Stack(norm="none", **stack)
    )
    return build(config, seed=0), torch.ones(8, 2, *size)


@pytest.mark.parametrize("net", NETS)
def test_every_net_takes_its_input_with_the_noise_before_anything_else(net):
    model, x = net_of(net, input_noise=SIGMA)
    seen = []
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(x)
    model.eval()(x)
    n = x.numel()
    assert float((seen[0] - x).mean()) == pytest.approx(0.0, abs=5.0 * SIGMA / math.sqrt(n))
    assert float((seen[0] - x).std()) == pytest.approx(SIGMA, rel=5.0 / math.sqrt(2 * n))
    assert torch.equal(seen[1], x)
    # Names of weights and the weights of a seed are those without noise.
    plain, _ = net_of(net)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(plain.eval()(x), model(x))


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_points_have_noise_too(net):
    model = build(
        NetConfig(net=net, depth=8, channels=2, size=None, kind="mlp", stack=Stack(input_noise=SIGMA)), seed=0
    )
    assert isinstance(model.stem, GaussianNoise)
    assert not torch.equal(model(torch.ones(4, 2)), model(torch.ones(4, 2)))


def test_what_dropout_drops_of_a_noisy_input_is_zero():
    layer = Stack(input_noise=SIGMA, input_dropout=0.5, dropout=Dropout(inverted=False)).input_layer()
    out = layer(torch.ones(100, 100))
    assert float((out == 0.0).double().mean()) == pytest.approx(0.5, abs=0.03)
    kept = out[out != 0.0] - 1.0
    assert float(kept.std()) == pytest.approx(SIGMA, rel=0.05)


def test_a_stack_without_either_leaves_the_input_alone():
    assert isinstance(Stack().input_layer(), nn.Identity)
