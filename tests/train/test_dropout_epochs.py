"""Dropout over the epochs: each schedule by its formula, for every kind of dropout, through copies and refinements."""

import copy

import pytest
import torch
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, ODEBlock, Stack, build
from resode.blocks import Branch, compiled, convert
from resode.blocks.alike import difference
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import DROPOUTS
from resode.layers.dropout import Dropout as DropoutLayer
from resode.nets.refine import refine
from resode.train.dropout_epochs import DropoutEpochs, drop_rates
from resode.train.refinement import Refine

NETS = ("resnet", "odenet")


def net_of(net="resnet", kind="unit", *, p=0.5, schedule="constant", inverted=True, **settings):
    stack = Stack(norm="group", dropout=Dropout(kind, p, schedule, inverted), **settings)
    return build(NetConfig(net=net, depth=14, width=4, steps=2, channels=1, size=(8, 8), stack=stack), 0)


def rates(model):
    """What each layer that was built with dropout drops with."""
    return [p for layer, _, p in drop_rates(model) if not isinstance(layer, Conv2d | Linear) or p or is_scaled(layer)]


def is_scaled(layer):
    return getattr(layer, "_built_drop_rate", (0.0, 0.0))[0] > 0.0


def images(count=6):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# Schedules


FORMULAS = {
    ("all", "constant", 0): [1, 1, 1, 1, 1, 1],
    ("all", "linear", 4): [0.25, 0.5, 0.75, 1, 1, 1],
    ("early", "constant", 2): [1, 1, 0, 0, 0, 0],
    ("early", "linear", 4): [1, 0.75, 0.5, 0.25, 0, 0],
    ("early", "linear", 1): [1, 0, 0, 0, 0, 0],
    ("late", "constant", 2): [0, 0, 1, 1, 1, 1],
    ("late", "linear", 2): [0, 0, 0.5, 1, 1, 1],
}


@pytest.mark.parametrize(("phase", "schedule", "epochs"), FORMULAS)
def test_the_factor_of_each_epoch(phase, schedule, epochs):
    dropping = DropoutEpochs(phase, epochs, schedule)
    assert [dropping.factor(epoch) for epoch in range(6)] == FORMULAS[phase, schedule, epochs]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", DROPOUTS)
def test_every_kind_drops_with_the_factor_times_the_p_it_was_built_with(net, kind):
    model = net_of(net, kind, schedule="linear", input_dropout=0.1)
    built = rates(model)
    assert len(set(built)) > 2  # that of the input, and of branches at several depths
    dropping = DropoutEpochs("early", 4, "linear")
    for epoch in (0, 1, 2, 5, 1):  # also back again: only the number of the epoch counts
        assert dropping(model, None, epoch) is False
        assert rates(model) == [dropping.factor(epoch) * p for p in built]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_without_dropout_the_net_is_the_one_without_dropout(net, kind, inverted):
    model, plain = net_of(net, kind, inverted=inverted, input_dropout=0.2), net_of(net, p=0.0)
    DropoutEpochs("late", 3)(model, None, 0)
    before = torch.get_rng_state()
    for mode in (True, False):
        assert torch.equal(model.train(mode)(images()), plain.train(mode)(images()))
    assert torch.equal(torch.get_rng_state(), before)
    DropoutEpochs("late", 3)(model, None, 3)
    assert not torch.equal(model.train()(images()), plain.train()(images()))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_that_is_not_inverted_is_evaluated_with_the_p_of_the_end(net, kind):
    model, other = net_of(net, kind, inverted=False), net_of(net, kind, p=0.25, inverted=False)
    DropoutEpochs("early", 4, "linear").replay(model, 3)
    assert torch.equal(model.eval()(images()), other.eval()(images()))


def test_masks_of_a_solve_drop_with_the_p_of_the_epoch():
    # dh/dt = m/(1 − p), from 0 over [0, 1]: the state at the end is the mask of the solve.
    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = DropoutLayer(0.8)

        def forward(self, t, h):
            return self.drop(torch.ones_like(h))

    block = ODEBlock(Ones(), "euler", steps=3)
    DropoutEpochs("early", 2, "linear")(block, None, 1)
    torch.manual_seed(0)
    end = block(torch.zeros(200, 100))
    assert sorted({round(v, 4) for v in end.unique().tolist()}) == [0.0, round(1 / 0.6, 4)]
    assert float((end == 0).float().mean()) == pytest.approx(0.4, abs=0.015)  # 4 standard deviations


def test_compiled_steps_follow_the_epoch(monkeypatch):
    def block(compile):
        torch.manual_seed(0)
        branch = Branch(4, Stack(norm="none", dropout=Dropout(p=0.5)), "mlp")
        return ODEBlock(branch, "euler", steps=2, compile=compile)

    # The steps are traced, and their graphs run as they are: generating code for them takes long.
    monkeypatch.setattr(compiled.torch, "compile", lambda graph, **_: graph)
    pair, x = (block(True), block(False)), torch.ones(5, 4)
    for epoch in (0, 1, 2, 0):
        ends = []
        for each in pair:
            DropoutEpochs("early", 2, "linear")(each, None, epoch)
            torch.manual_seed(1)
            ends.append(each(x))
        torch.testing.assert_close(*ends)


# Copies, refinements, replays


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", DROPOUTS)
def test_copies_and_refined_nets_know_what_they_were_built_with(net, kind):
    model, dropping = net_of(net, kind, schedule="linear"), DropoutEpochs("early", 2)
    built = set(rates(model))
    dropping(model, None, 2)
    for other in (copy.deepcopy(model), refine(model)):
        assert set(rates(other)) == {0.0}
        dropping(other, None, 1)
        assert set(rates(other)) == built
    assert set(rates(model)) == {0.0}


def test_blocks_that_differ_in_dropout_alone_stay_alike():
    model = net_of(schedule="linear")
    one, other = model.stages[0][0], model.stages[0][1]
    DropoutEpochs("early", 2)(model, None, 1)
    assert rates(one) != rates(other)
    assert difference(one, other) is None


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_a_replay_gives_what_the_callbacks_gave(net, order):
    callbacks = [Refine((1,)), DropoutEpochs("early", 3, "linear")]
    for epochs in (0, 1, 2, 4):
        trained, replayed = net_of(net), net_of(net)
        for epoch in range(epochs):
            for callback in callbacks:
                callback(trained, torch.optim.SGD(trained.parameters(), 0.1), epoch)
        for callback in callbacks[:: 1 - 2 * order]:
            callback.replay(replayed, epochs)
        assert rates(trained) == rates(replayed)


def test_a_p_that_was_set_since_counts_as_built():
    layer = DropoutLayer(0.5)
    DropoutEpochs("late", 1)(layer, None, 0)
    layer.p = 0.2
    DropoutEpochs()(layer, None, 0)
    assert layer.p == 0.2
    DropoutEpochs("late", 1)(layer, None, 0)
    DropoutEpochs()(layer, None, 0)
    assert layer.p == 0.2


def test_layers_of_others_follow_too():
    from torchvision.ops import StochasticDepth

    model = nn.Sequential(nn.Dropout(0.4), nn.Dropout2d(0.2), StochasticDepth(0.5, "row"), convert(nn.Dropout(0.6)))
    DropoutEpochs("early", 2, "linear")(model, None, 1)
    assert [layer.p for layer in model] == [0.2, 0.1, 0.25, 0.3]


def test_attention_and_timms_drop_path_follow_too():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.4), layers.DropPath(0.2), layers.DropPath(None))
    callback = DropoutEpochs("early", 2, "linear")
    callback(model, None, 1)
    assert (model[0].dropout, model[1].drop_prob, model[2].drop_prob) == (0.2, 0.1, 0.0)
    callback(model, None, 2)
    assert (model[0].dropout, model[1].drop_prob, model[2].drop_prob) == (0.0, 0.0, 0.0)


# Refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"phase": "middle"}, "unknown phase of dropout 'middle': choose from all, early, late"),
        ({"phase": "early", "epochs": 1, "schedule": "cosine"}, "choose from constant, linear"),
        ({"phase": "early"}, "dropout of phase early and a constant schedule needs a number of epochs"),
        ({"schedule": "linear"}, "dropout of phase all and a linear schedule needs a number of epochs"),
        ({"epochs": 3}, "epochs of dropout is 3, and dropout of phase all .* the same in every epoch"),
        ({"phase": "late", "epochs": -1}, "epochs of dropout is -1: a whole number"),
        ({"phase": "late", "epochs": 1.5}, "epochs of dropout is 1.5: a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        DropoutEpochs(**settings)
