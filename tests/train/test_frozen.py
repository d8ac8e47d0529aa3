"""Frozen batch norm: running statistics in training, too, which nothing changes; γ and β are trained on."""

import copy

import pytest
import torch
from torch import nn

from resode.blocks import Branch, ODEBlock, ResidualBlock, compiled
from resode.errors import InvalidInput
from resode.layers import BatchNorm
from resode.train.frozen import FreezeNorm, freeze, is_frozen, unfreeze
from resode.train.recalibrate import recalibrate

NETS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4)),
    "torch's": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ResidualBlock(Branch(4))),
    "ode": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ODEBlock(Branch(4, time="concat"), "rk4", steps=2)),
    "adjoint": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ODEBlock(Branch(4), "heun", steps=2, gradient="adjoint")),
    "adaptive": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ODEBlock(Branch(4), "dopri5", rtol=1e-2, atol=1e-2)),
    "compiled": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ODEBlock(Branch(4), "euler", steps=2, compile=True)),
}
EAGER = [name for name in NETS if name != "compiled"]


def images(seed=0, b=4):
    return 2.0 * torch.randn(b, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) + 1.0


def warmed(name):
    """A net that has met a few batches."""
    torch.manual_seed(0)
    net = NETS[name]()
    for seed in range(3):
        net(images(seed))
    return net


def statistics(net):
    return [buffer.clone() for buffer in net.buffers()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", EAGER)
def test_training_is_evaluation_and_the_statistics_stay(name):
    net = warmed(name)
    before, expected = statistics(net), copy.deepcopy(net).eval()(images(9))
    assert not torch.allclose(copy.deepcopy(net).train()(images(9)), expected, rtol=1e-2)
    assert freeze(net) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()) > 0
    for frozen in (net.train(), copy.deepcopy(net).train(), copy.deepcopy(net).eval().train()):
        out = frozen(images(9))
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        assert same(before, frozen.buffers())


@pytest.mark.parametrize("name", EAGER)
def test_weight_and_bias_of_the_norm_are_trained_on(name):
    net = warmed(name)
    freeze(net)
    net.train()(images(9)).square().sum().backward()
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.weight.grad.abs().max() > 0 and norm.bias.grad.abs().max() > 0 for norm in norms)


@pytest.mark.parametrize("name", EAGER)
def test_unfrozen_it_is_as_it_was(name):
    net = warmed(name)
    twin = copy.deepcopy(net)
    freeze(net), freeze(net)
    net.train()(images(9))
    assert unfreeze(net) > 0
    assert unfreeze(net) == 0
    assert torch.equal(net(images(5)), twin(images(5)))
    assert same(twin.buffers(), net.buffers())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_a_compiled_step_is_another_once_it_is_frozen(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda graph, **options: graph)  # the traced graph as it is
    net = warmed("compiled")
    before, expected = statistics(net), copy.deepcopy(net).eval()(images(9))
    freeze(net)
    torch.testing.assert_close(net.train()(images(9)), expected)
    assert same(before, net.buffers())


def test_a_compiled_norm_of_torchs_is_frozen_and_unfrozen_too():
    net = warmed("torch's")
    called = torch.compile(net, backend="eager")
    called.train()(images(8))
    before, expected = statistics(net), copy.deepcopy(net).eval()(images(9))
    freeze(net)
    torch.testing.assert_close(called.train()(images(9)), expected)
    assert same(before, net.buffers())
    unfreeze(net)
    called.train()(images(9))
    assert not same(before, net.buffers())


def test_a_batch_of_one_is_no_longer_refused():
    layer = BatchNorm(4)
    with pytest.raises(InvalidInput, match="frozen statistics"):
        layer(torch.randn(1, 4))
    freeze(layer)
    assert layer(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("name", ["torch's", "ode"])
def test_recalibration_leaves_frozen_statistics_alone(name):
    net = warmed(name)
    before = statistics(net)
    freeze(net)
    assert recalibrate(net, [images(7), images(8)]) == 0
    assert same(before, net.buffers())
    unfreeze(net)
    assert recalibrate(net, [images(7), images(8)]) > 0
    assert not same(before, net.buffers())


@pytest.mark.parametrize("kind", [BatchNorm, nn.BatchNorm2d])
def test_without_running_statistics_there_is_nothing_to_freeze(kind):
    net = nn.Sequential(BatchNorm(3), kind(4, track_running_stats=False))
    with pytest.raises(InvalidInput, match="1 is a batch norm without running statistics"):
        freeze(net)
    assert not is_frozen(net[0])


@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_callback_freezes_once_so_many_epochs_are_done(after):
    callback = FreezeNorm(after)
    net = nn.Sequential(BatchNorm(4))
    for epoch in range(5):
        assert callback(net, None, epoch) is False
        assert is_frozen(net[0]) == (epoch >= after)
    for epochs in range(5):  # as it was at the end of so many epochs
        resumed = nn.Sequential(BatchNorm(4))
        callback.replay(resumed, epochs)
        assert is_frozen(resumed[0]) == (epochs - 1 >= after)


@pytest.mark.parametrize("after", [-1, 1.5, True, "2"])
def test_another_number_of_epochs_is_refused(after):
    with pytest.raises(InvalidInput, match="whole number"):
        FreezeNorm(after)
