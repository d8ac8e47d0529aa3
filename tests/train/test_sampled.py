"""Training on some of the steps, drawn for each batch."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from resode import InvalidInput, NetConfig, Recipe, Stack, build, data, fit
from resode.blocks import ResidualBlock
from resode.train import SampledSteps


def net_of(**settings):
    config = {"net": "resnet", "depth": 14, "width": 4, "channels": 2, "size": (8, 8), "classes": 3, **settings}
    return build(NetConfig(**config), seed=0)


def blocks(net):
    return [module for module in net.modules() if isinstance(module, ResidualBlock)]


def calls_of(net):
    """Which branches are evaluated in training, noted as it happens."""
    called = []
    for i, block in enumerate(blocks(net)):
        block.branch.register_forward_pre_hook(lambda branch, _, i=i: called.append(i) if branch.training else None)
    return called


@pytest.mark.parametrize("active", [1, 3, 6])
def test_exactly_that_many_branches_are_evaluated_each_time_anew(active):
    net = net_of()
    sampled, called = SampledSteps(net, active), calls_of(net)
    x, drawn = torch.rand(4, 2, 8, 8), []
    torch.manual_seed(1)
    for _ in range(60):
        called.clear()
        sampled(x)
        assert len(called) == len(set(called)) == active
        drawn += called
    # Every block has its turn: with p = active/6 each, 60 draws miss none by more than chance would.
    assert all(abs(drawn.count(i) / 60 - active / 6) < 0.25 for i in range(6))


def test_the_others_are_their_shortcuts_and_the_active_ones_stand_for_them():
    net = net_of(stack=Stack(norm="group")).double()
    sampled, called = SampledSteps(net, 2), calls_of(net)
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    out = sampled(x)
    kept = set(called)
    h = net.stem(x)
    for i, block in enumerate(blocks(net)):
        h = block.post(block.shortcut(h) + (3.0 * block.branch(block.t, h) if i in kept else 0.0))
    torch.testing.assert_close(out, net.head(h), rtol=1e-14, atol=1e-14)


def test_all_steps_active_is_the_net_itself():
    net, x = net_of(stack=Stack(norm="group")), torch.rand(4, 2, 8, 8)
    assert torch.equal(SampledSteps(net, 6)(x), net(x))


class Constant(torch.nn.Module):
    """f(t, h) = c, whatever h is."""

    def __init__(self, c):
        super().__init__()
        self.register_buffer("c", torch.tensor(c))

    def forward(self, t, h):
        return self.c.expand_as(h)


def test_the_mean_over_the_draws_is_the_whole():
    net, x = torch.nn.Sequential(*(ResidualBlock(Constant(c)) for c in (1.0, 2.0, 6.0))), torch.zeros(1, 1)
    sampled = SampledSteps(net, 2)
    drawn = {float(sampled(x)) for _ in range(60)}
    assert sorted(drawn) == pytest.approx([1.5 * 3, 1.5 * 7, 1.5 * 8])
    assert sum(drawn) / 3 == pytest.approx(float(net(x)))


def test_evaluation_is_of_the_whole_net_and_draws_nothing():
    net, x = net_of(), torch.rand(4, 2, 8, 8)
    sampled = SampledSteps(net, 2).eval()
    state = torch.get_rng_state()
    assert torch.equal(sampled(x), net(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_and_statistics_are_of_the_active_blocks_alone():
    net = net_of()
    sampled, called = SampledSteps(net, 2), calls_of(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sampled(torch.rand(4, 2, 8, 8)).square().sum().backward()
    for i, block in enumerate(blocks(net)):
        active = i in called
        assert all((p.grad is not None) == active for p in block.branch.parameters())
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    prefixes = [name for name, module in net.named_modules() if module in [blocks(net)[i] for i in called]]
    assert all(name.startswith(("stem", "head", *prefixes)) for name in changed)
    assert any(name.startswith(prefixes[0]) for name in changed)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m).module]
)
def test_a_copy_stands_on_its_own_model(copied):
    sampled = SampledSteps(net_of(), 6).eval()
    other = copied(sampled)
    with torch.no_grad():
        for p in sampled.model.parameters():
            p.zero_()
    x = torch.rand(4, 2, 8, 8)
    other.train()
    assert not torch.equal(other(x), sampled.train()(x))
    assert sampled.state_dict().keys() == other.state_dict().keys() == {f"model.{n}" for n in net_of().state_dict()}


def test_a_recipe_trains_so_and_the_seed_decides():
    digits = data.load("digits", seed=0)

    def trained(active, seed=0):
        net = build(NetConfig(net="resnet", depth=14, width=4, channels=1, size=(8, 8), classes=10), seed=0)
        called = calls_of(net)
        recipe = Recipe(epochs=1, batch_size=256, active_steps=active, seed=seed)
        records = fit(net, digits, recipe)
        steps = len(digits.train) // 256
        return records[0]["train_loss"], len(called), steps

    loss, evaluated, steps = trained(2)
    assert evaluated == 2 * steps
    assert trained(2)[0] == loss != trained(2, seed=1)[0]
    assert trained(None)[1] == 6 * steps


@pytest.mark.parametrize("active", [0, 7])
def test_a_number_of_steps_that_is_not_there_is_refused(active):
    with pytest.raises(InvalidInput, match=rf"{active} active steps: from 1 to 6"):
        SampledSteps(net_of(), active)


def test_it_is_refused_before_training():
    digits = data.load("digits", seed=0)
    net = build(NetConfig(net="plain", depth=8, width=4, channels=1, size=(8, 8), classes=10), seed=0)
    with pytest.raises(InvalidInput, match="from 1 to 0"):
        fit(net, digits, Recipe(epochs=1, active_steps=1))
    with pytest.raises(InvalidInput, match="has an ODE block"):
        SampledSteps(net_of(net="odenet", steps=2), 1)
    with pytest.raises(InvalidInput, match="active_steps"):
        Recipe(active_steps=0)
