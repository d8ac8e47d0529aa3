"""Lesions against the plain way to make them: for each step, one whole forward pass without it."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resode import (
    Dropout,
    InvalidInput,
    NetConfig,
    ODEBlock,
    ResidualBlock,
    ResidualDynamics,
    Stack,
    Step,
    build,
    dynamics,
    evaluate,
)
from resode.nets import PlainLayer
from resode.paths import lesion
from resode.paths.lesion import LesionTable

NETS = {
    "basic": {"net": "resnet", "depth": 14},
    "preact": {"net": "resnet", "depth": 14, "kind": "preact", "shortcut": "projection"},
    "tied": {"net": "resnet", "depth": 20, "tied": True},
    "plain": {"net": "plain", "depth": 14},
    "vgg": {"net": "vgg", "blocks": 2, "convs": (2, 3), "channels": 64},
    "odenet": {"net": "odenet", "solver": "midpoint", "steps": (2, 3, 1)},
}


def net_of(name, **settings):
    """A small net whose batch norms have seen data, in training mode, with dropout."""
    stack = Stack(dropout=Dropout(p=0.2))
    defaults = {"width": 4, "channels": 2, "size": (8, 8), "classes": 4, "stack": stack}
    config = NetConfig(**{**defaults, **NETS[name], **settings})
    net = build(config, seed=1)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, config.channels, 8, 8))
    return net


def batches(name, sizes=(6, 5)):
    generator = torch.Generator().manual_seed(2)
    channels = NETS[name].get("channels", 2)
    return [
        (torch.randn(n, channels, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in sizes
    ]


# The plain way, from the modules themselves


def units(net):
    """(apply, delete) of each step: delete is None where the step cannot be left out."""
    for stage in net.stages:
        for module in stage:
            if isinstance(module, ResidualBlock):
                yield module, lambda h, block=module: block.post(block.shortcut(h))
            elif isinstance(module, ODEBlock):
                yield from midpoint_steps(module)
            elif isinstance(module, PlainLayer):
                convolution = module.layers[0]
                keeps = convolution.in_channels == convolution.out_channels and convolution.stride == (1, 1)
                yield module, (lambda h: h) if keeps else None
            else:
                yield module, None


def midpoint_steps(block):
    """The steps of h(t + Δ) = h + Δ f(t + Δ/2, h + Δ/2 f(t, h))."""
    width = 1 / block.steps
    for i in range(block.steps):

        def step(h, t=i * width):
            slope = evaluate(block.branch, t, h)
            return h + width * evaluate(block.branch, t + width / 2, h + width / 2 * slope)

        yield step, lambda h: h


def by_hand(net, data):
    """Error and loss of the whole net, and of the net without each step, by a forward pass for each."""

    def measure(applied):
        wrong = loss = count = 0
        for x, labels in data:
            h = net.stem(x)
            for unit in applied:
                h = unit(h)
            logits = net.head(h)
            wrong += sum(int(z.argmax() != label) for z, label in zip(logits, labels, strict=True))
            loss += float(F.cross_entropy(logits.double(), labels)) * len(labels)
            count += len(labels)
        return wrong / count, loss / count

    steps = list(units(net))
    whole = [apply for apply, _ in steps]
    without = [
        None if delete is None else measure([*whole[:i], delete, *whole[i + 1 :]])
        for i, (_, delete) in enumerate(steps)
    ]
    return measure(whole), without


@pytest.mark.parametrize("name", NETS)
def test_lesions_are_those_of_whole_forward_passes(name):
    net, data = net_of(name), batches(name)
    table = lesion.single(dynamics(net), data)
    net.eval()
    with torch.no_grad():
        (error, loss), without = by_hand(net, data)
    assert table.baseline.count == 11
    assert table.baseline.error == error
    assert table.baseline.loss == pytest.approx(loss, rel=1e-5)
    assert len(table.lesions) == len(without)
    for found, expected in zip(table.lesions, without, strict=True):
        if expected is None:
            assert found.score is None
        else:
            assert found.score.error == expected[0]
            assert found.score.loss == pytest.approx(expected[1], rel=1e-5)
    # The test can tell: no two lesions are alike.
    losses = [found.score.loss for found in table.made]
    assert len({round(loss, 6) for loss in [*losses, table.baseline.loss]}) == len(losses) + 1


def test_the_whole_net_is_as_the_trainer_measures_it():
    from resode.train import evaluate as measure

    net, data = net_of("basic"), batches("basic")
    table, metrics = lesion.single(dynamics(net), data), measure(net, data)
    assert (table.baseline.error, table.baseline.count) == (pytest.approx(1 - metrics.accuracy), metrics.count)
    assert table.baseline.loss == pytest.approx(metrics.loss, rel=1e-6)


# What cannot be deleted


def test_poolings_and_layers_that_change_the_shape_have_no_lesion():
    table = lesion.single(dynamics(net_of("vgg")), batches("vgg"))
    assert [(each.label, each.kind, each.score is None) for each in table.lesions] == [
        ("1.1", "plain", False),  # 64 to 64 channels
        ("1.2", "plain", False),
        ("1.3", "transition", True),
        ("2.1", "plain", True),  # 64 to 128
        ("2.2", "plain", False),
        ("2.3", "plain", False),
        ("2.4", "transition", True),
    ]
    assert [each.steps[0] for each in table.made] == [0, 1, 4, 5]


def test_a_plain_net_cannot_lose_the_layers_that_change_the_shape():
    table = lesion.single(dynamics(net_of("plain")), batches("plain"))
    assert [each.label for each in table.lesions if each.score is None] == ["2.1", "3.1"]


def test_a_residual_net_can_lose_any_block():
    for name in ("basic", "preact", "odenet"):
        table = lesion.single(dynamics(net_of(name)), batches(name))
        assert table.made == table.lesions


def test_each_lesion_says_where_its_step_stands():
    view = dynamics(net_of("odenet"))
    table = lesion.single(view, batches("odenet"))
    for i, (found, step) in enumerate(zip(table.lesions, view.steps, strict=True)):
        assert (found.steps[0], found.label, found.kind, found.stage, found.t) == (
            i, step.label, step.kind, step.stage, step.t
        )  # fmt: skip


# Cost


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_deletions_of_n_steps_cost_n_n_plus_1_over_2_evaluations(count):
    calls = []

    def branch(t, h):
        calls.append(t)
        return h.tanh()

    steps = [Step(kind="residual", branch=branch, t=float(i)) for i in range(count)]
    view = ResidualDynamics(lambda x: x, steps, lambda h: h).measured(torch.rand(1, 2))
    calls.clear()
    lesion.single(view, [(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))] * 2)
    assert len(calls) == 2 * count * (count + 1) // 2
    # Step i is evaluated once in the whole net, and once without each of the i steps before it.
    assert [calls.count(float(i)) for i in range(count)] == [2 * (i + 1) for i in range(count)]


def test_the_cost_of_a_net_is_that_of_its_branches():
    net = net_of("basic")
    view, calls = dynamics(net), []
    for block in net.modules():
        if isinstance(block, ResidualBlock):
            block.branch.register_forward_pre_hook(lambda *_: calls.append(1))
    lesion.single(view, batches("basic", (4,)))
    assert len(calls) == 6 * 7 // 2


# Data


def test_batches_weigh_by_their_samples():
    view, (data,) = dynamics(net_of("basic")), batches("basic", (11,))
    parts = [(data[0][s], data[1][s]) for s in (slice(0, 1), slice(1, 8), slice(8, 11))]
    whole, split = lesion.single(view, [data]), lesion.single(view, iter(parts))
    assert split.baseline.count == whole.baseline.count == 11
    assert [each.score.error for each in split.lesions] == [each.score.error for each in whole.lesions]
    assert [each.score.loss for each in split.lesions] == pytest.approx(
        [each.score.loss for each in whole.lesions], rel=1e-5
    )


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data_is_an_error(data):
    with pytest.raises(InvalidInput, match="lesions need data"):
        lesion.single(dynamics(net_of("basic")), data)


def test_a_generator_of_batches_is_enough():
    net, data = net_of("basic"), batches("basic")
    view = dynamics(net)
    assert lesion.single(view, (batch for batch in data), progress=True) == lesion.single(view, data)


# The model is left alone


@pytest.mark.parametrize("name", ["basic", "vgg", "odenet"])
def test_the_model_is_left_as_it_was(name):
    net = net_of(name)
    for i, module in enumerate(net.modules()):
        module.training = i % 3 > 0
    modes = [module.training for module in net.modules()]
    held = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    view = dynamics(net)
    table = lesion.single(view, batches(name))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    # It is measured in evaluation mode, whatever the mode was.
    assert lesion.single(view, batches(name)) == table
    net.eval()
    assert lesion.single(view, batches(name)) == table


def test_the_modes_are_restored_after_an_error():
    net = net_of("basic").train()
    with pytest.raises(RuntimeError):
        lesion.single(dynamics(net), [(torch.rand(2, 9, 8, 8), torch.zeros(2, dtype=torch.int64))])
    assert all(module.training for module in net.modules())


# Tables


def test_a_table_survives_json():
    for name in ("vgg", "odenet"):
        table = lesion.single(dynamics(net_of(name)), batches(name))
        again = LesionTable.from_dict(json.loads(json.dumps(table.to_dict())))
        assert again == table
        assert again.made == table.made
        assert replace(again, analysis="layer") != table


def test_deleting_the_only_step_that_matters_ruins_the_answers():
    labels = torch.arange(8) % 4
    right = Step(kind="residual", branch=lambda t, h: F.one_hot(labels, 4).float())
    idle = Step(kind="residual", branch=lambda t, h: torch.zeros_like(h))
    wrong = -10.0 * F.one_hot(labels, 4).float() / 20.0
    table = lesion.single(ResidualDynamics(nn.Identity(), [idle, right], nn.Identity()), [(wrong, labels)])
    assert table.baseline.error == table.lesions[0].score.error == 0.0
    assert table.lesions[1].score.error == 1.0
    assert table.lesions[1].score.loss > table.baseline.loss == table.lesions[0].score.loss
