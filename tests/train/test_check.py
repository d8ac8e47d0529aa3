"""The check before a training: a sound net passes, and each way to break a net or its data is found by its question."""

import copy
import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, Recipe, Stack, build
from resode.blocks import Branch, ResidualBlock
from resode.data import load as load_data
from resode.data.augment import Augment
from resode.layers.dropout import Dropout as DropoutLayer
from resode.nets import Architecture
from resode.runs import jsonable
from resode.train import Data, Setup, findings
from resode.train.check import EDGES, _shares, check, check_model, picture

NETS = {
    "resnet": {"net": "resnet", "depth": 8},
    "skipinit": {"net": "resnet", "depth": 14, "scale": "skipinit"},
    "odenet": {"net": "odenet", "steps": 1, "solver": "midpoint"},
    "steered": {"net": "odenet", "steps": 1, "solver": "midpoint", "steer": 0.2, "gradient": "adjoint"},
}
NAMES = [
    "statistics of the inputs",
    "loss at initialization",
    "every parameter gets a gradient",
    "keeps samples apart",
    "overfits one batch",
    "learns from the inputs",
]


@cache
def digits():
    return load_data("digits")


def net_of(name="resnet", **stack):
    return build(NetConfig(**NETS[name], width=8, channels=1, size=(8, 8), stack=Stack(**stack)), 0)


def batch(count=64):
    return next(digits().batches("train", count, generator=torch.Generator().manual_seed(0)))


class Wrapped(nn.Module):
    """A net with something before and after it."""

    def __init__(self, net, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        z = self.net(x if self.before is None else self.before(x))
        return z if self.after is None else self.after(z)


def failed(report):
    return [finding.name for finding in report.findings if not finding.passed]


# Sound nets


@pytest.mark.parametrize("name", NETS)
def test_a_sound_net_passes_every_question(name):
    model = net_of(name, dropout=Dropout(p=0.3), input_dropout=0.1)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    modes = [module.training for module in model.modules()]
    held = {key: value.clone() for key, value in model.state_dict().items()}
    state, told = torch.get_rng_state(), []
    report = check_model(model, digits(), Recipe(), tell=told.append)
    assert [finding.name for finding in report.findings] == NAMES
    assert failed(report) == []
    assert report.passed
    assert told == list(report.findings)
    # Nothing is left behind.
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_points_and_binary_cross_entropy():
    setup = Setup(
        architecture=Architecture(net="odenet", kind="mlp", steps=2),
        stack=Stack(norm="none", activation="tanh"),
        data=Data(data="moons"),
        recipe=Recipe(loss="bce"),
    )
    report = check(setup)
    assert report.passed
    assert report.findings[1].values["expected"] == math.log(2)
    assert len(report.picture["inputs"][0]) == 2
    assert check(setup).to_dict() == report.to_dict()


def test_settings_that_do_not_fit_are_refused_before_anything_is_asked():
    told = []
    with pytest.raises(InvalidInput, match="device 'gpu' is not there"):
        check(Setup(), "gpu", tell=told.append)
    with pytest.raises(InvalidInput, match="this data are images"):
        check(Setup(architecture=Architecture(kind="mlp")), tell=told.append)
    few = replace(digits(), train=digits().train.take(slice(7)))
    with pytest.raises(InvalidInput, match="training split has 7 samples: at least 8"):
        check_model(net_of(), few, Recipe(), tell=told.append)
    with pytest.raises(InvalidInput, match="this Net has no parameter that requires a gradient"):
        check_model(net_of().requires_grad_(False), digits(), Recipe(), tell=told.append)
    assert told == []


# Loss at initialization


def test_equal_probabilities_have_the_loss_log_k():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    x, labels = batch()
    found = findings.loss_at_initialization(model, x, labels)
    assert found.passed
    assert found.values["loss"] == pytest.approx(math.log(10), rel=1e-6)
    assert findings.loss_at_initialization(model, x, labels, "bce").values["loss"] == pytest.approx(math.log(2))


def test_a_biased_head_is_found():
    model, (x, labels) = net_of(), batch()
    with torch.no_grad():
        model.head[-1].bias[3] += 10.0
    found = findings.loss_at_initialization(model, x, labels)
    assert not found.passed
    assert found.values["loss"] > 6.0
    assert "scale the last layer down" in found.said


def test_a_net_that_knows_the_answers_is_found():
    x, labels = batch()
    model = Wrapped(net_of(), after=lambda z: z + 5.0 * nn.functional.one_hot(labels, 10))
    found = findings.loss_at_initialization(model, x, labels)
    assert not found.passed
    assert "the answers are in the inputs" in found.said


def test_batch_norms_take_the_moments_of_the_batch_and_dropout_is_off():
    model, (x, labels) = net_of(dropout=Dropout(p=0.9)), batch()
    alike = net_of().train()
    expected = nn.functional.cross_entropy(alike(x), labels)
    assert findings.loss_at_initialization(model, x, labels).values["loss"] == pytest.approx(float(expected.detach()))


# One batch


def test_a_net_that_cannot_tell_samples_apart_does_not_overfit():
    x, labels = batch(32)
    found = findings.overfits_one_batch(Wrapped(net_of(), before=torch.zeros_like), x, labels, steps=30)
    assert not found.passed
    assert found.values["accuracy"] < 0.5


def test_a_gradient_of_the_wrong_sign_does_not_overfit():
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return -g

    x, labels = batch(32)
    assert not findings.overfits_one_batch(Wrapped(net_of(), after=Reversed.apply), x, labels, steps=30).passed
    assert findings.overfits_one_batch(net_of(), x, labels, steps=30).passed


def test_a_learning_rate_ten_times_as_large_is_tried_where_the_first_is_too_small():
    moons = load_data("moons")
    x, labels = next(moons.batches("train", 32, generator=torch.Generator().manual_seed(0)))
    stack = Stack(norm="none", activation="tanh")
    model = build(NetConfig(net="odenet", kind="mlp", steps=2, channels=2, size=None, classes=2, stack=stack), 0)
    found = findings.overfits_one_batch(model, x, labels)
    assert found.passed
    assert found.values["rate"] == 1e-2
    assert 0 < found.values["steps"] <= 300


# The inputs


def repeated(pairs):
    while True:
        yield from pairs


@pytest.mark.parametrize("broken", ["labels", "inputs"])
def test_labels_or_inputs_that_say_nothing_are_found(broken):
    x, labels = batch(600)
    if broken == "labels":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    else:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(x[200:].split(50), labels[200:].split(50), strict=True))
    found = findings.learns_from_the_inputs(net_of(), lambda: repeated(pairs), (x[:200], labels[:200]), steps=(10, 40))
    assert not found.passed
    assert found.values["steps"] == 40


def test_the_net_without_inputs_learns_how_frequent_the_classes_are_and_no_more():
    x, _ = batch(600)
    labels = (x.mean((1, 2, 3)) > x.mean() + 0.1).long()  # told by the inputs, and uneven
    pairs = list(zip(x[200:].split(50), labels[200:].split(50), strict=True))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    found = findings.learns_from_the_inputs(
        model, lambda: repeated(pairs), (x[:200], labels[:200]), rate=1e-2, steps=(400,)
    )
    share = float(labels[:200].float().mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.passed
    assert found.values["loss_without_inputs"] == pytest.approx(entropy, abs=0.02)
    assert found.values["loss"] < 0.6 * entropy
    assert found.values["lead"] == pytest.approx(found.values["loss_without_inputs"] - found.values["loss"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: replace(data, mean=data.mean + 0.4), "the train split is not standardized"),
        (lambda data: replace(data, std=255 * data.std), "the train split is not standardized"),
        (lambda data: replace(data, mean=data.mean * math.nan), "inputs of the train split are not finite"),
        (
            lambda data: replace(data, test=replace(data.test, inputs=data.test.inputs // 255)),
            "the test split is not standardized",
        ),
        (
            lambda data: replace(data, validation=replace(data.validation, labels=data.validation.labels + 1)),
            "labels of the validation split are not all in 0 … 9",
        ),
        (
            lambda data: replace(data, train=replace(data.train, labels=data.train.labels.clamp_max(8))),
            "class 9 has no sample to train on",
        ),
    ],
)
def test_data_that_are_not_ready_are_found(change, says):
    found = findings.statistics_of_inputs(change(digits()))
    assert not found.passed
    assert says in found.said


def test_statistics_are_those_of_the_standardized_inputs():
    found = findings.statistics_of_inputs(digits())
    train = found.values["train"]
    x = digits().standardize(digits().train.inputs)
    assert found.passed
    assert train["least"] == float(x.min())
    assert train["greatest"] == float(x.max())
    assert train["mean"] == pytest.approx([0.0], abs=1e-6)
    assert train["std"] == pytest.approx([1.0], abs=1e-5)
    assert sum(train["counts"]) == len(x)
    few = findings.statistics_of_inputs(digits(), limit=100).values["train"]
    assert few["std"] != train["std"]
    assert few["counts"] == train["counts"]


# Samples of a batch


def test_a_net_that_averages_over_the_batch_is_found():
    x, _ = batch(4)
    for after in (lambda z: z - z.mean(0), lambda z: z + 1e-6 * z.roll(1, 0)):
        found = findings.keeps_samples_apart(Wrapped(net_of(norm="group"), after=after), x)
        assert not found.passed
        assert "in evaluation, too" in found.said
        assert found.values["share_in_evaluation"] > 0


def test_batch_norm_alone_may_mix_samples_in_training():
    x, _ = batch(4)
    normed = findings.keeps_samples_apart(net_of(), x)
    assert normed.passed
    assert normed.values["share_in_evaluation"] == 0.0
    assert normed.values["share_in_training"] > 0.01
    assert "by batch norm" in normed.said
    state = torch.get_rng_state()
    group = findings.keeps_samples_apart(net_of(norm="group", dropout=Dropout(p=0.3)), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert group.passed
    assert group.values["share_in_training"] == 0.0

    class Mixes(nn.Module):
        def forward(self, z):
            return z - z.mean(0) if self.training else z

    found = findings.keeps_samples_apart(Wrapped(net_of(norm="group"), after=Mixes()), x)
    assert not found.passed
    assert "in training it does, and there is no batch norm" in found.said


def test_shares_are_those_of_the_jacobian():
    # z_i = x_i + c·Σ_j x_j has ∂z_i/∂x_j = δ_ij + c: off the diagonal B(B − 1)c² of that plus B(1 + c)².
    B, c = 4, 0.5
    found = findings.keeps_samples_apart(Wrapped(nn.Identity(), after=lambda z: z + c * z.sum(0)), torch.randn(B, 3))
    share = (B - 1) * c**2 / ((B - 1) * c**2 + (1 + c) ** 2)
    assert found.values["share_in_evaluation"] == pytest.approx(share)


def test_an_answer_that_does_not_depend_on_its_input_is_found():
    model = Wrapped(net_of(norm="group"), before=lambda x: x.detach())
    found = findings.keeps_samples_apart(model, batch(4)[0])
    assert not found.passed
    assert "does not depend on its own input" in found.said


# Gradients


class Extra(nn.Module):
    """A net with a parameter that does ``use`` say."""

    def __init__(self, use):
        super().__init__()
        self.net, self.extra, self.use = net_of(), nn.Parameter(torch.ones(10)), use

    def forward(self, x):
        return self.use(self.net(x), self.extra)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda z, w: z, "extra never does"),
        (lambda z, w: z + 0.0 * w, "extra never does"),
        (lambda z, w: z * w.detach(), "extra never does"),
        (lambda z, w: z + (w - 1).sqrt(), "is not finite"),
    ],
)
def test_parameters_without_a_gradient_are_found(use, says):
    found = findings.every_parameter_gets_a_gradient(Extra(use), *batch())
    assert not found.passed
    assert says in found.said
    assert findings.every_parameter_gets_a_gradient(Extra(lambda z, w: z * w), *batch()).passed


def test_parameters_that_get_their_gradient_later_pass():
    found = findings.every_parameter_gets_a_gradient(net_of("skipinit"), *batch())
    assert found.passed
    model, (x, labels) = net_of("skipinit").train(), batch()
    nn.functional.cross_entropy(model(x), labels).backward()
    assert any(not p.grad.any() for p in model.parameters())  # at first there is none behind a scale of 0


def test_a_parameter_whose_work_a_norm_undoes_is_told():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

        def forward(self, x):
            return self.two(self.norm(self.one(x.flatten(1))).relu())

    found = findings.every_parameter_gets_a_gradient(Shifted(), *batch())
    assert found.passed
    assert found.values["rounding"] == ["one.bias"]


def test_a_deep_net_without_norms_is_found_to_begin_with_a_large_loss():
    branch = Branch(8, Stack(norm="none"))
    blocks = [ResidualBlock(copy.deepcopy(branch)) for _ in range(40)]
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), *blocks, nn.Flatten(), nn.Linear(8 * 64, 10))
    assert not findings.loss_at_initialization(model, *batch()).passed


# The picture


def test_the_picture_shows_the_images_as_they_were_before_they_were_standardized():
    data = replace(digits(), train=digits().train.take(slice(10)))
    drawn = picture(net_of(), data, Recipe(seed=3))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.tensor(drawn["inputs"], dtype=torch.uint8), data.train.inputs[order])
    assert drawn["labels"] == data.train.labels[order].tolist()
    shifted = picture(net_of(), data, Recipe(seed=3), Augment(shift=3))
    assert shifted["labels"] == drawn["labels"]
    assert shifted["inputs"] != drawn["inputs"]


@pytest.mark.parametrize("name", ["resnet", "odenet"])
def test_the_picture_holds_the_outputs_and_gradients_of_the_layers(name):
    model = net_of(name)
    drawn = json.loads(json.dumps(jsonable(picture(model, digits(), Recipe()))))
    layers = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [layer["name"] for layer in drawn["outputs"]] == layers
    for layer in drawn["outputs"]:
        assert sum(layer["shares"]) == pytest.approx(1.0)
        assert len(layer["shares"]) == len(EDGES) - 1
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert [weight["name"] for weight in drawn["gradients"]] == weights
    assert all(weight["norm"] > 0 for weight in drawn["gradients"])


def test_shares_of_a_histogram():
    shares = _shares(torch.tensor([-7.0, -4.9, 0.1, 0.15, 0.3, math.inf]))
    places = {i: round(6 * share) for i, share in enumerate(shares) if share}
    assert places == {0: 2, 25: 2, 26: 1, 49: 1}


def test_dropout_of_the_net_is_no_part_of_the_questions():
    # A net that drops nearly everything in training, and is sound apart from that.
    model = Wrapped(net_of(), before=DropoutLayer(0.99))
    assert failed(check_model(model, digits(), Recipe())) == []
