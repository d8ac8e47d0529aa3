"""Operations that graphs leave to torch's kernels: described to the compiler as they are, with their gradients."""

import pytest
import torch
import torch.nn.functional as F

from resode.layers import kernels
from resode.layers.conv import add_time

# Dynamo looks at the .grad of every input it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def images(layout="contiguous", dtype=torch.float64, shape=(3, 8, 4, 5), seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def normed(x, weight, bias):
    return kernels._group_norm(x, weight, bias, *x.shape[:2], x.shape[2:].numel(), 2, 1e-5)


def affine(dtype=torch.float64):
    return [images(shape=(8,), seed=seed, dtype=dtype) for seed in (1, 2)]


@pytest.mark.parametrize("affined", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_is_what_the_compiler_is_told(layout, dtype, affined):
    """Also its strides: torch's own description of its norm has those of another order of memory."""
    x = images(layout, dtype)
    weight, bias = affine(dtype) if affined else (None, None)
    sizes = (*x.shape[:2], x.shape[2:].numel(), 2)
    torch.library.opcheck(kernels._group_norm, (x, weight, bias, *sizes, 1e-5))
    y, mean, scale = (part.detach() for part in normed(x, weight, bias))
    given = None if weight is None else weight.detach()
    torch.library.opcheck(kernels._group_norm_backward, (y, x.detach(), mean, scale, given, *sizes))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_and_its_gradients_are_torchs(layout):
    for affined in (True, False):
        x = images(layout)
        weight, bias = affine() if affined else (None, None)
        inputs = [x, weight, bias] if affined else [x]
        seen, expected = normed(x, weight, bias)[0], F.group_norm(x, 2, weight, bias)
        assert torch.equal(seen, expected)
        along = torch.randn_like(seen)
        for one, other in zip(*(torch.autograd.grad(y, inputs, along) for y in (seen, expected)), strict=True):
            assert torch.equal(one, other)


def test_half_precision_with_weights_in_float32_is_described_as_it_is():
    x, (weight, bias) = images(dtype=torch.bfloat16), affine(torch.float32)
    torch.library.opcheck(kernels._group_norm, (x, weight, bias, 3, 8, 20, 2, 1e-5))
    assert normed(x, weight, bias)[1].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_spread_over_a_batch_lies_in_one_place_and_its_gradient_is_the_sum(layout):
    one = images(layout, shape=(1, 8, 4, 5))
    torch.library.opcheck(kernels._sum_over_batch, (images(layout),))
    spread = kernels.spread(one, 3)
    assert spread.stride(0) == 0
    assert torch.equal(spread, one.expand(3, -1, -1, -1))
    along = images(layout).detach()
    (gradient,) = torch.autograd.grad(spread, one, along)
    torch.testing.assert_close(gradient, along.sum(0, keepdim=True), rtol=1e-14, atol=1e-14)
    torch.autograd.gradcheck(lambda x: kernels.spread(x, 3), (one,))
    torch.autograd.gradgradcheck(lambda x: kernels.spread(x, 3).square(), (one,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_time_that_is_a_tensor_adds_what_a_number_adds_with_its_gradients(dtype):
    for layout in LAYOUTS:
        results = []
        for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
            out, K = images(layout, dtype), images(shape=(1, 8, 4, 5), seed=1, dtype=dtype)
            y = add_time(out * 1.0, t, K)
            results.append([y, *torch.autograd.grad(y, [out, K], images(layout, dtype, seed=2))])
        for number, tensor in zip(*results, strict=True):
            torch.testing.assert_close(
                tensor, number, **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {})
            )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_a_time_that_is_differentiated_has_its_gradient():
    out, K, t = images(), images(shape=(1, 8, 4, 5), seed=1), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda out, K, t: add_time(out * 1.0, t, K), (out, K, t))
    _, rate = torch.func.jvp(lambda t: add_time(out * 1.0, t, K), (t.detach(),), (torch.ones_like(t),))
    torch.testing.assert_close(rate, K.expand_as(out))


def test_gpus_keep_the_kernels_that_are_made_for_them():
    assert kernels.in_graphs(torch.device("cpu"))
    assert not kernels.in_graphs(torch.device("cuda"))
