"""Small batches: what batch norm's moments lose by them, and the norms that do not see them."""

import pytest
import torch

from resode.errors import InvalidInput
from resode.layers import NORMS, BatchNorm, make_norm

SIZES = (2, 4, 8, 32)
WITHOUT_BATCH = [name for name in NORMS if name not in ("batch", "none")]


def moments(size, draws=4000):
    """Mean and unbiased variance that batch norm takes of ``draws`` batches of standard normal vectors."""
    x = torch.randn(size, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    norm = BatchNorm(draws, momentum=1.0).double()  # each channel is a draw
    norm(x)
    return norm.running_mean, norm.running_var


@pytest.mark.parametrize("size", SIZES)
def test_the_moments_of_a_batch_scatter_about_the_truth_by_its_size(size):
    """Var μ_B = σ²/B, and Var σ_B² = 2σ⁴/(B − 1), for Gaussian values."""
    mean, variance = moments(size)
    count = len(mean)
    # The variance of n squared deviations of a Gaussian has a relative deviation of √(2/n); of σ_B², a scaled χ² of
    # B − 1 degrees, of √((2 + 12/(B − 1))/n).
    assert float(mean.var()) == pytest.approx(1 / size, rel=5 * (2 / count) ** 0.5)
    spread = 5 * ((2 + 12 / (size - 1)) / count) ** 0.5
    assert float(variance.var()) == pytest.approx(2 / (size - 1), rel=spread)
    assert float(variance.mean()) == pytest.approx(1.0, abs=5 * (2 / (size - 1) / count) ** 0.5)


def test_the_variance_of_the_mean_falls_as_one_over_the_size():
    found = torch.tensor([float(moments(size)[0].var()) for size in SIZES]).log()
    sizes = torch.tensor([float(size) for size in SIZES]).log()
    slope = ((found - found.mean()) * (sizes - sizes.mean())).sum() / (sizes - sizes.mean()).square().sum()
    assert float(slope) == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize("name", WITHOUT_BATCH)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_other_norms_do_not_depend_on_the_batch(name, size):
    x = torch.randn(8, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = make_norm(name, 16).double()
    torch.testing.assert_close(norm(x[:size]), norm(x)[:size], rtol=1e-12, atol=1e-12)


def test_batch_norm_depends_on_the_batch_in_training_alone():
    x = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    norm = BatchNorm(16)
    assert not torch.allclose(norm(x[:2]), norm(x)[:2], atol=0.01)
    norm.eval()
    torch.testing.assert_close(norm(x[:2]), norm(x)[:2])


@pytest.mark.parametrize("shape", [(1, 16), (1, 16, 1, 1)])
def test_a_batch_of_one_value_a_channel_is_refused_in_training(shape):
    norm = BatchNorm(16)
    with pytest.raises(InvalidInput, match="larger batches"):
        norm(torch.randn(shape))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.randn(shape)).shape == shape
