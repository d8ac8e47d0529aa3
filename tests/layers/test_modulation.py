"""Layers that scale: FiLM by time, LayerScale by a learned factor."""

import math

import pytest
import torch

from resode.layers.modulation import FiLM, LayerScale, fourier_features


def film(channels=3):
    torch.manual_seed(0)
    layer = FiLM(channels).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, torch.tensor(0.3, dtype=torch.float64)])
def test_fourier_features_are_t_and_its_sines_and_cosines(t):
    found = fourier_features(t, torch.arange(1.0, 4.0, dtype=torch.float64)).tolist()
    t = float(t)
    expected = [t, *(math.sin(math.pi * k * t) for k in (1, 2, 3)), *(math.cos(math.pi * k * t) for k in (1, 2, 3))]
    assert found == pytest.approx(expected, abs=1e-12)


def test_film_starts_near_the_identity_and_yet_knows_the_time():
    torch.manual_seed(0)
    layer, h = FiLM(8), torch.randn(4, 8, 3, 3)
    for t in (0.0, 0.5, 1.0):
        assert (layer(h, t) - h).norm() < 0.1 * h.norm()
    assert not torch.equal(layer(h, 0.0), layer(h, 0.5))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
def test_film_is_one_scale_and_shift_a_channel(shape):
    layer, t = film(), 0.37
    ones = torch.ones(1, *shape[1:], dtype=torch.float64)
    shift = layer(0.0 * ones, t)
    scale = layer(ones, t) - shift
    flat = torch.stack([scale, shift]).reshape(2, 3, -1)
    assert torch.allclose(flat, flat[..., :1].expand_as(flat))
    assert len(flat[0, :, 0].unique()) == 3
    h = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(h, t), scale * h + shift)


def test_film_by_its_formula():
    layer, h, t = film(), torch.randn(4, 3, 5, 2, dtype=torch.float64), 0.37
    gamma, beta = (layer.weight @ fourier_features(t, layer.frequencies) + layer.bias).view(2, 1, 3, 1, 1)
    torch.testing.assert_close(layer(h, t), (1 + gamma) * h + beta)


def test_film_takes_a_float_or_a_tensor_and_every_parameter_a_gradient():
    layer, h = film(), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(h, 0.3), layer(h, torch.tensor(0.3, dtype=torch.float64)))
    layer(h, 0.3).square().sum().backward()
    assert all((p.grad != 0).all() for p in layer.parameters())


def test_film_can_be_differentiated_by_time():
    layer, h = film(), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    layer(h, t).sum().backward()
    e = 1e-6
    slope = (layer(h, 0.3 + e) - layer(h, 0.3 - e)).sum() / (2 * e)
    assert t.grad.item() == pytest.approx(slope.item(), rel=1e-6)


def test_films_frequencies_follow_the_module_but_are_no_state():
    layer = FiLM(3).double()
    assert layer.frequencies.dtype == torch.float64
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
def test_layer_scale_multiplies_each_channel(shape):
    layer, h = LayerScale(3), torch.randn(shape)
    torch.testing.assert_close(layer(h), 1e-6 * h)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    for c, factor in enumerate((1.0, -2.0, 0.5)):
        torch.testing.assert_close(layer(h)[:, c], factor * h[:, c])
    assert LayerScale(3, init=0.25).weight.tolist() == [0.25] * 3
