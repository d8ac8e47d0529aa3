"""Weights in half precision whose errors cancel."""

import pytest
import torch

from resode.layers.rounding import round_filters


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (6, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_weight_is_near_and_the_errors_of_a_filter_cancel(shape, dtype):
    exact = weight(*shape)
    found = round_filters(exact, dtype)
    assert (found.shape, found.dtype) == (exact.shape, dtype)
    unit = torch.finfo(dtype).eps * float(exact.abs().max())
    errors = (found.double() - exact.double()).flatten(1)
    assert errors.abs().max() <= unit
    assert errors.sum(1).abs().max() <= unit
    # Rounding each to the nearest leaves a sum that grows with the size of the filter.
    nearest = (exact.to(dtype).double() - exact.double()).flatten(1)
    assert errors.sum(1).norm() < 0.5 * nearest.sum(1).norm()


def test_what_can_be_held_is_held():
    exact = weight(4, 3, 3, 3).bfloat16()
    assert torch.equal(round_filters(exact, torch.bfloat16), exact)
    assert torch.equal(round_filters(exact.double(), torch.bfloat16), exact)


def test_the_layout_is_kept():
    exact = weight(8, 4, 3, 3).to(memory_format=torch.channels_last)
    found = round_filters(exact, torch.bfloat16)
    assert found.stride() == exact.stride()
    assert torch.equal(found, round_filters(exact.contiguous(), torch.bfloat16))
