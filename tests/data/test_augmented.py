"""`Augmented`: augmentation in front of a model, with random numbers of its own."""

import copy
import io

import pytest
import torch
from torch import nn

from resode.blocks import ODEBlock, ResidualBlock
from resode.blocks.branch import Branch
from resode.data import Augment, Augmented, load
from resode.errors import InvalidInput

AUGMENT = Augment(flip=True, shift=2, rotate=10.0)


class Seen(nn.Module):
    """Keeps what it is given, and draws random numbers, as dropout does, where it has any."""

    def __init__(self, p=0.0):
        super().__init__()
        self.dropout, self.head, self.inputs = nn.Dropout(p), nn.Linear(64, 10), []

    def forward(self, x):
        self.inputs.append(x)
        return self.head(self.dropout(x.flatten(1)))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture
def images(digits):
    return digits.train.inputs[:20]


def test_in_training_it_augments_then_standardizes(digits, images):
    model = Augmented(Seen(), AUGMENT, standardize=digits.standardize, seed=3)
    logits = model(images)
    expected = digits.standardize(AUGMENT(images, torch.Generator().manual_seed(3)))
    assert torch.equal(model.model.inputs[0], expected)
    assert logits.shape == (20, 10)
    model(images)
    assert not torch.equal(model.model.inputs[1], expected)


def test_in_evaluation_it_only_standardizes(digits, images):
    model = Augmented(Seen(), Augment(flip=True, mixup=1.0), standardize=digits.standardize).eval()
    state = model.generator.get_state()
    labels = torch.arange(20) % 10
    logits, same = model(images, labels)
    assert same is labels
    assert torch.equal(logits, model(images))
    assert all(torch.equal(x, digits.standardize(images)) for x in model.model.inputs)
    assert torch.equal(model.generator.get_state(), state)


def test_points_pass_where_there_is_no_augmentation():
    points = torch.randn(5, 64)
    model = Augmented(Seen(), Augment())
    model(points)
    assert model.model.inputs[0] is points


def test_augmentation_is_the_same_whatever_the_model_draws(images):
    seen = []
    for p in (0.0, 0.5):
        model = Augmented(Seen(p), AUGMENT, standardize=torch.Tensor.float)
        for _ in range(3):
            model(images)
        seen.append(torch.cat(model.model.inputs))
    assert torch.equal(*seen)


def test_the_model_draws_the_same_whatever_the_augmentation(images):
    draws = []
    for augment in (Augment(), AUGMENT):
        torch.manual_seed(0)
        model = Augmented(Seen(), augment, standardize=torch.Tensor.float)
        model(images)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    "augment", [Augment(mixup=1.0), Augment(cutmix=1.0), Augment(flip=True, mixup=1.0, cutmix=1.0)]
)
def test_mixing_gives_the_shares_that_the_images_were_mixed_by(digits, images, augment):
    labels = digits.train.labels[:20]
    model = Augmented(Seen(), augment, standardize=digits.standardize, seed=1)
    logits, shares = model(images, labels)
    generator = torch.Generator().manual_seed(1)
    x, expected = augment.mix(digits.standardize(augment(images, generator)), labels, 10, generator)
    assert torch.equal(model.model.inputs[0], x)
    assert torch.equal(shares, expected)
    nn.functional.cross_entropy(logits, shares).backward()
    assert model.model.head.weight.grad.abs().sum() > 0


def test_without_mixing_the_labels_come_back(images):
    labels = torch.arange(20)
    _, same = Augmented(Seen(), AUGMENT, standardize=torch.Tensor.float)(images, labels)
    assert same is labels


def test_a_resumed_training_goes_on_with_the_draws_that_would_have_followed(images):
    model = Augmented(Seen(), AUGMENT, standardize=torch.Tensor.float, seed=5)
    model(images)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    model(images)
    file.seek(0)
    resumed = Augmented(Seen(), AUGMENT, standardize=torch.Tensor.float, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed(images)
    assert torch.equal(resumed.model.inputs[0], model.model.inputs[1])
    assert not torch.equal(model.model.inputs[0], model.model.inputs[1])


def test_a_deep_copy_draws_by_itself_and_shares_the_data_set(digits, images):
    model = Augmented(Seen(), AUGMENT, standardize=digits.standardize)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(images)
        one(images)
    assert all(torch.equal(x, y) for x, y in zip(model.model.inputs, twin.model.inputs, strict=True))
    assert twin.standardize.function.__self__ is digits
    assert twin.model.head.weight is not model.model.head.weight


def test_standardize_may_be_a_module_with_parameters_or_buffers(images):
    model = Augmented(Seen(), AUGMENT, standardize=nn.BatchNorm2d(1, affine=False))
    assert "standardize.running_mean" in model.state_dict()
    twin = copy.deepcopy(model)  # with a module of its own, as of the model
    model(images.float())
    assert model.standardize.running_mean != 0
    assert twin.standardize.running_mean == 0


@pytest.mark.parametrize("block", [ResidualBlock, lambda f: ODEBlock(f, "rk4", steps=2)])
def test_residual_and_ode_nets_are_augmented_alike(digits, images, block):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), block(Branch(4)), nn.Flatten(), nn.Linear(256, 10))
    model = Augmented(net, Augment(flip=True, cutmix=1.0), standardize=digits.standardize)
    logits, shares = model(images, digits.train.labels[:20])
    nn.functional.cross_entropy(logits, shares).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_it_cannot_do_is_refused(images):
    with pytest.raises(InvalidInput, match=r"alternate_flip .* use flip"):
        Augmented(Seen(), Augment(alternate_flip=True))
    with pytest.raises(InvalidInput, match="seed is -1"):
        Augmented(Seen(), AUGMENT, seed=-1)
    mixing = Augmented(Seen(), Augment(mixup=1.0), standardize=torch.Tensor.float)
    with pytest.raises(InvalidInput, match=r"\(x, labels\)"):
        mixing(images)
    with pytest.raises(InvalidInput, match="labels are"):
        mixing(images, torch.arange(3))
    with pytest.raises(InvalidInput, match="labels go from 0 to 19, and there are 10 classes"):
        mixing(images, torch.arange(20))
