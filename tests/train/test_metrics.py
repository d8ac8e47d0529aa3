"""Loss, accuracy and evaluations of f against counts by hand."""

import math

import pytest
import torch
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, ODEBlock, Stack, build, solver_settings
from resode.blocks import Branch
from resode.train import Metrics, evaluate, nfe
from resode.train.metrics import first_nonfinite


def small(net="resnet", **settings):
    defaults = {"depth": 14, "width": 4, "steps": 2, "channels": 2, "size": (8, 8), "classes": 4}
    return build(NetConfig(net=net, **{**defaults, **settings}), seed=0)


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 2, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


# Loss and accuracy


def test_loss_and_accuracy_are_means_over_the_samples_however_they_are_batched():
    model, data = small(stack=Stack(norm="group", dropout=Dropout(p=0.5))), batches(5, 1, 7)
    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for x, labels in data:
            for z, label in zip(model(x).double(), labels, strict=True):
                right += int(z.argmax() == label)
                loss += math.log(sum(math.exp(v) for v in z.tolist())) - float(z[label])
    model.train()
    found = evaluate(model, iter(data))
    assert found.count == 13
    assert found.accuracy == right / 13
    assert found.loss == pytest.approx(loss / 13, rel=1e-9)
    whole = [(torch.cat([x for x, _ in data]), torch.cat([labels for _, labels in data]))]
    assert evaluate(model, whole).loss == pytest.approx(found.loss, rel=1e-6)
    assert evaluate(model, whole).accuracy == found.accuracy


def test_a_long_sum_loses_nothing():
    # In float32, adding 0.1 to a sum of a million would change it by 0.125 or not at all.
    logits = torch.tensor([[0.0, 1000.0], [0.0, math.log(math.expm1(0.1))]])

    class Table(nn.Module):
        def forward(self, x):
            return logits[x[:, 0].long()]

    data = [(torch.tensor([[float(i)]]), torch.tensor([0])) for i in [0] * 1000 + [1] * 1000]
    assert evaluate(Table(), data).loss == pytest.approx((1e6 + 1000 * 0.1) / 2000, abs=1e-3, rel=0)


def test_evaluation_restores_modes_and_touches_nothing():
    model = small(stack=Stack(dropout=Dropout(p=0.5)))
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    modes = [module.training for module in model.modules()]
    held = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = evaluate(model, batches(4)), evaluate(model, batches(4))
    assert one == two
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_evaluate_on_is_an_error():
    for none in ([], iter(())):
        with pytest.raises(InvalidInput, match="the split is empty"):
            evaluate(small(), none)


def test_metrics_are_plain_values():
    assert Metrics(0.5, 0.75, 4, 26).to_dict() == {"loss": 0.5, "accuracy": 0.75, "count": 4, "nfe": 26}


# Evaluations of f


def count_calls(model):
    """Evaluations of every branch of ``model`` in one forward pass, by hooks."""
    calls = []
    hooks = [
        branch.register_forward_pre_hook(lambda *_: calls.append(1))
        for branch in model.modules()
        if isinstance(branch, Branch)
    ]
    with torch.no_grad():
        model(batches(3)[0][0])
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"net": "resnet"}, 6),
        ({"net": "resnet", "depth": 20, "tied": True}, 9),
        ({"net": "plain"}, 0),
        ({"net": "odenet", "solver": "euler", "steps": (1, 2, 3)}, 6 + 2),
        ({"net": "odenet", "solver": "midpoint"}, 3 * 2 * 2 + 2),
        ({"net": "odenet", "solver": "rk4"}, 3 * 2 * 4 + 2),
        ({"net": "odenet", "solver": "dopri5", "steps": None}, None),
        ({"net": "odenet", "solver": "dopri5"}, 3 * 2 * 6 + 2),
        ({"net": "odenet", "solver": "bosh3", "steps": None, "rtol": 1e-5, "atol": 1e-5}, None),
    ],
)
def test_nfe_is_the_number_of_evaluations_of_branches(settings, expected):
    model = small(**settings)
    calls = count_calls(model)
    assert nfe(model) == calls
    assert expected in (None, calls)
    assert evaluate(model, batches(3)).nfe == count_calls(model.eval())


def test_nfe_is_that_of_the_last_pass():
    model = small("odenet", solver="euler")
    count_calls(model)
    with solver_settings(model, steps=5):
        count_calls(model)
        assert nfe(model) == 3 * 5 + 2
    assert nfe(model) == 3 * 5 + 2
    count_calls(model)
    assert nfe(model) == 3 * 2 + 2


def test_evaluations_of_a_backward_pass_are_not_counted():
    block = ODEBlock(Branch(3, Stack(norm="none"), "mlp"), "euler", steps=4, gradient="adjoint")
    block(torch.rand(2, 3)).sum().backward()
    assert block.stats.nfe_backward > 0
    assert nfe(nn.Sequential(block)) == 4


# Values that are not finite


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([1.0, 2.0], None),
        ([], None),
        ([math.nan], 0),
        ([1.0, math.inf, math.nan], 1),
        ([1.0, 2.0, -math.inf], 2),
    ],
)
def test_the_first_value_that_is_not_finite(values, first):
    assert first_nonfinite(torch.tensor(values)) == first
