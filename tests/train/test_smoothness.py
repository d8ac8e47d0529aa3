"""Smoothness along the gradient: a quadratic where all is known, and that nothing is left changed."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from resode import nets
from resode.blocks import Branch, ODEBlock
from resode.errors import InvalidInput
from resode.layers import BatchNorm, Dropout
from resode.stack import Dropout as DropoutSettings
from resode.stack import Stack
from resode.train.smoothness import Along, Smoothness, smoothness

ETAS = (0.01, 0.1, 0.5, 2.0)


class Point(nn.Module):
    """A model whose output is its weights, in two parameters."""

    def __init__(self, w):
        super().__init__()
        self.first, self.rest = nn.Parameter(w[:1].clone()), nn.Parameter(w[1:].clone())

    def forward(self, x):
        return torch.cat([self.first, self.rest])


def quadratic(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return root @ root.T, torch.randn(n, dtype=torch.float64, generator=generator)


def test_on_a_quadratic_all_is_in_closed_form():
    A, w = quadratic()
    other = 3.0 * torch.eye(6, dtype=torch.float64)
    batches = [(torch.empty(0), A), (torch.empty(0), other)]
    found = smoothness(Point(w), batches, ETAS, loss=lambda out, A: 0.5 * out @ A @ out)
    assert found.step_sizes == ETAS
    for (_, M), along in zip(batches, found.batches, strict=True):
        g = M @ w
        L, gg, gMg = 0.5 * float(w @ g), float(g @ g), float(g @ M @ g)
        assert along.loss == pytest.approx(L)
        assert along.gradient == pytest.approx(math.sqrt(gg))
        assert along.losses == pytest.approx([L - eta * gg + 0.5 * eta**2 * gMg for eta in ETAS])
        assert along.changes == pytest.approx([eta * float((M @ g).norm()) for eta in ETAS])
    betas = [float((M @ M @ w).norm() / (M @ w).norm()) for _, M in batches]
    assert betas[1] == pytest.approx(3.0)
    assert found.beta == pytest.approx(sum(betas) / 2)


def test_the_measures_are_means_over_the_batches_of_extremes_over_the_step_sizes():
    batches = (Along(1.0, 2.0, (0.5, 3.0), (1.0, 8.0)), Along(2.0, 4.0, (5.0, 1.0), (2.0, 2.0)))
    found = Smoothness((0.5, 1.0), batches)
    assert found.loss_range == ((0.5 + 1.0) / 2, (3.0 + 5.0) / 2)
    assert found.gradient_range == ((1.0 + 2.0) / 2, (8.0 + 2.0) / 2)
    assert found.beta == (max(1.0 / (0.5 * 2.0), 8.0 / 2.0) + max(2.0 / (0.5 * 4.0), 2.0 / 4.0)) / 2
    stored = found.to_dict()
    assert stored["beta"] == found.beta
    assert stored["batches"][1]["losses"] == (5.0, 1.0)
    assert Smoothness((1.0,), (Along(1.0, 0.0, (1.0,), (0.0,)),)).beta == 0.0


MODELS = {
    "resnet": lambda: nets.resnet(8, Stack(dropout=DropoutSettings(p=0.3)), width=4, channels=1, size=(8, 8)),
    "odenet": lambda: nets.odenet(
        Stack(dropout=DropoutSettings(p=0.3)), width=4, channels=1, size=(8, 8), steps=2, gradient="adjoint"
    ),
    "frozen weights": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8).requires_grad_(False), BatchNorm(8), nn.ReLU(), nn.Linear(8, 10)
    ),
}


def batches(count=2):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8)) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_changed(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.eval()
    next(layer for layer in model.modules() if isinstance(layer, BatchNorm)).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    smoothness(model, batches(), (0.1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def test_it_is_restored_also_when_the_loss_fails():
    model, calls = MODELS["frozen weights"](), []
    before = copy.deepcopy(model.state_dict())

    def failing(out, labels):
        calls.append(1)
        return nn.functional.cross_entropy(out, labels) if len(calls) < 3 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        smoothness(model.eval(), batches(), (0.1, 1.0), loss=failing)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not model.training


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_net_is_seen_in_training_mode_and_by_a_step_of_gradient_descent(norm):
    """Against a step made by torch's SGD on a copy."""
    torch.manual_seed(0)
    block = ODEBlock(Branch(4, Stack(norm=norm, activation="tanh")), "heun", steps=2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), block, nn.Flatten(), nn.Linear(144, 10)).double()
    ((x, labels),) = batches(1)
    (along,) = smoothness(model.eval(), [(x.double(), labels)], ETAS).batches
    for eta, loss in zip(ETAS, along.losses, strict=True):
        twin = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(twin.parameters(), lr=eta)
        nn.functional.cross_entropy(twin(x.double()), labels).backward()
        optimizer.step()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(twin(x.double()), labels)
        assert loss == pytest.approx(float(expected), rel=1e-9)


def test_dropout_draws_the_same_masks_at_every_step_size():
    """So the loss is continuous along the step: it nears L(w) − η‖g‖² as η falls, by second order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), Dropout(0.5), nn.Linear(32, 10)).double()
    etas = (4e-3, 2e-3, 1e-3)
    ((x, labels),) = batches(1)
    (along,) = smoothness(model, [(x.double(), labels)], etas).batches
    errors = [loss - (along.loss - eta * along.gradient**2) for eta, loss in zip(etas, along.losses, strict=True)]
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("data", "etas", "message"),
    [
        ([], (0.1,), "there is none"),
        ("some", (), "at least one step size"),
        ("some", (0.1, 0.0), "step size is 0.0"),
        ("some", (float("inf"),), "step size is inf"),
    ],
)
def test_what_makes_no_sense_is_refused(data, etas, message):
    with pytest.raises(InvalidInput, match=message):
        smoothness(MODELS["frozen weights"](), batches() if data == "some" else data, etas)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(InvalidInput, match="parameters that are trained"):
        smoothness(nn.Flatten(), batches(), (0.1,))
