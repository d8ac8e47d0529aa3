"""Norms in half precision and under autocast: statistics in float32, and the output in the type of the input."""

import copy

import pytest
import torch
from torch import nn

from resode.blocks import Branch, ODEBlock, ResidualBlock
from resode.layers import NORMS, BatchNorm, make_norm

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
HALF = [torch.bfloat16, torch.float16]
KINDS = [(name, "channel") for name in NORMS if name != "none"] + [("layer", "elementwise")]


def states(dtype, device, seed=0):
    """Images whose mean is 40 standard deviations from 0: statistics in half precision would lose them."""
    x = torch.randn(6, 16, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (0.5 * x + 20.0).to(device, dtype)


def norm_of(name, affine, device):
    norm = make_norm(name, 16, (5, 5), affine)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return norm.to(device)


def close_to(found, expected, dtype):
    """To one rounding of the output, and what Σx² − Nμ² loses in float32 where μ is 40 times the deviation (some of
    torch's kernels take the variance so). In half precision, that would be all of it."""
    unit, lost = torch.finfo(dtype).eps / 2, 10 * torch.finfo(torch.float32).eps * 40**2
    assert ((found.double() - expected).abs() <= 1.01 * unit * expected.abs() + lost).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.float32, *HALF])
@pytest.mark.parametrize("autocast", HALF)
@pytest.mark.parametrize(("name", "affine"), KINDS)
def test_under_autocast_a_norm_errs_by_one_rounding_of_its_output(name, affine, autocast, given, layout, device):
    norm, x = norm_of(name, affine, device), states(given, device).contiguous(memory_format=layout)
    expected = copy.deepcopy(norm).double()(x.double())
    with torch.autocast(device, autocast):
        out = norm(x)
    assert out.dtype == given
    close_to(out, expected, given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
def test_the_running_statistics_are_those_of_float64(dtype, device):
    norm, x = BatchNorm(16, momentum=1.0).to(device), states(dtype, device)
    with torch.autocast(device, dtype):
        norm(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=0)
    with torch.autocast(device, dtype):
        evaluated = norm.eval()(x)
    close_to(evaluated, (x.double() - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt(), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["residual", "backprop", "adjoint"])
def test_in_blocks_the_statistics_are_gathered_in_float32(name, dtype, device):
    torch.manual_seed(0)
    branch = Branch(16)
    block = ResidualBlock(branch) if name == "residual" else ODEBlock(branch, "heun", steps=2, gradient=name)
    block = block.to(device)
    first = next(layer for layer in block.modules() if isinstance(layer, BatchNorm))
    first.momentum = 1.0
    x = states(torch.float32, device).requires_grad_()
    seen = []
    first.register_forward_hook(lambda layer, given, out: seen.append((given[0].detach(), out.dtype)))
    with torch.autocast(device, dtype):
        out = block(x)
    out.float().square().sum().backward()
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in block.buffers())
    assert all(given.dtype == of_output for given, of_output in seen)
    mean = seen[0][0].double().mean((0, 2, 3))
    held = first.running_mean if name == "residual" else first.statistics(0.0)[0]
    torch.testing.assert_close(held.double(), mean, rtol=1e-6, atol=0)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in NORMS if name != "none"])
def test_large_numbers_of_float16_do_not_overflow(name, device):
    """Squares of them are beyond float16, and so are their sums."""
    x = (2e4 + 5e3 * torch.randn(6, 16, 5, 5, generator=torch.Generator().manual_seed(0))).to(device, torch.float16)
    norm = norm_of(name, "channel", device)
    with torch.autocast(device, torch.float16):
        out = norm(x)
    close_to(out, copy.deepcopy(norm).double()(x.double()), torch.float16)


def test_a_norm_in_half_precision_in_the_weights_too_keeps_their_type():
    for name in NORMS:
        norm = make_norm(name, 16).bfloat16()
        assert norm(states(torch.bfloat16, "cpu")).dtype == torch.bfloat16
    assert isinstance(norm, nn.Identity)


@pytest.mark.parametrize("knots", [(0.0,), (0.0, 1.0)])
def test_moments_of_float32_are_absorbed_by_statistics_of_another_type(knots):
    """Moments over several processes are of float32 at least, whatever the type of the buffers."""
    mean, variance = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        norm = BatchNorm(16, momentum=0.5).to(dtype)
        norm.set_knots(knots)
        norm.absorb([0.0], [mean], [variance], whole=True)
        assert norm.running_mean.dtype == dtype
        for held, found in ((norm.running_mean, 0.5 * mean), (norm.running_var, 0.5 + 0.5 * variance)):
            torch.testing.assert_close(held, found.to(dtype).expand_as(held))
