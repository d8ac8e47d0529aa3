"""What a recipe can ask for beyond its optimizer, in residual nets and in ODE nets: each acts, and can be resumed."""

from dataclasses import replace

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from resode import Dropout, InvalidInput, NetConfig, Recipe, Run, Stack, build, fit
from resode.data import Augment, Split, load
from resode.layers.layout import is_channels_last
from resode.train import evaluate, recalibrate
from resode.train.averaging import Average
from resode.train.dropout_epochs import DropoutEpochs
from resode.train.penalties import Penalties

NETS = ("resnet", "odenet")
SMALL = {"depth": 8, "width": 4, "channels": 1, "size": (8, 8), "steps": 2}


@pytest.fixture(scope="module")
def digits():
    data = load("digits", seed=0, validation=0.1)
    few = torch.arange(192)
    return type(data)(data.name, data.train.take(few), data.validation, data.test, data.classes, data.mean, data.std)


def net(name, seed=0, **stack):
    return build(NetConfig(net=name, stack=Stack(**stack), **SMALL), seed)


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


TECHNIQUES = {
    "ema": {"average": Average(kind="ema", decay=0.5)},
    "swa": {"average": Average(kind="swa", start=0.5)},
    "lookahead": {"average": Average(kind="lookahead", decay=0.8, every=2)},
    "l1": {"penalty": Penalties(l1=1e-3)},
    "group": {"penalty": Penalties(group=1e-3)},
    "factorize": {"factorize": True, "weight_decay": 1e-3},
    "late-dropout": {"dropping": DropoutEpochs(phase="late", epochs=1)},
    "early-dropout": {"dropping": DropoutEpochs(phase="early", epochs=2, schedule="linear")},
    "adaptive-clip": {"adaptive_clip": 0.02},
    "freeze-norm": {"freeze_norm": 1},
    "recalibrate": {"recalibrate": True},
    "sgdw": {"optimizer": "sgdw", "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "bce": {"loss": "bce"},
    "float16": {"precision": "float16"},
    "repeats": {"repeats": 2},
    "one-cycle": {"schedule": "one-cycle", "warmup": 1.0},
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_changes_the_result_and_an_interrupted_training_resumes_to_it(tmp_path, digits, technique, name):
    plain = {"epochs": 3, "batch_size": 64, "lr": 0.05}
    recipe = Recipe(**{**plain, **TECHNIQUES[technique]})
    whole, without, resumed = (net(name, dropout=Dropout("unit", 0.2)) for _ in range(3))
    fit(whole, digits, recipe)
    fit(without, digits, Recipe(**plain))
    assert not same(states(whole), states(without))

    def stop(model, optimizer, epoch):
        if epoch == 2:
            raise KeyboardInterrupt

    with Run.create(tmp_path / "run", {}) as run:
        with pytest.raises(KeyboardInterrupt):
            fit(net(name, dropout=Dropout("unit", 0.2)), digits, recipe, run=run, callbacks=[stop])
        fit(resumed, digits, recipe, run=run)
    assert same(states(whole), states(resumed))


AUGMENTATIONS = (
    Augment(mixup=0.4),
    Augment(cutmix=1.0),
    Augment(randaugment=2, magnitude=9),
    Augment(alternate_flip=True),
    Augment(rotate=15.0, cutout=3),
)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("augment", AUGMENTATIONS, ids=str)
def test_augmented_trainings_are_their_seeds(digits, augment, name):
    def trained(seed):
        model = net(name)
        records = fit(model, digits, Recipe(epochs=2, batch_size=64, lr=0.05, seed=seed), augment=augment)
        assert all(0.0 <= record["train_accuracy"] <= 1.0 for record in records)
        return states(model)

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


@pytest.mark.parametrize("name", NETS)
def test_channels_last_changes_the_layout_and_no_more_than_rounding(digits, name):
    seen = []
    one, other = net(name), net(name)
    convolution = next(
        layer for layer in other.modules() if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2)
    )
    convolution.register_forward_pre_hook(lambda _, inputs: seen.append(is_channels_last(inputs[0])))
    fit(one, digits, Recipe(epochs=1, batch_size=64, lr=0.01))
    fit(other, digits, Recipe(epochs=1, batch_size=64, lr=0.01, channels_last=True))
    assert all(seen[:3])
    for (key, value), again in zip(states(one).items(), states(other).values(), strict=True):
        torch.testing.assert_close(again, value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", NETS)
def test_the_statistics_at_the_end_are_those_of_the_training_set(digits, name):
    model = net(name)
    fit(model, digits, Recipe(epochs=1, batch_size=64, recalibrate=True))
    before = states(model)
    recalibrate(model, digits.batches("train", 512))
    for name, value in states(model).items():
        torch.testing.assert_close(before[name], value)


def test_the_statistics_at_the_end_are_those_of_the_whole_also_of_images_in_the_order_of_their_classes(digits):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(512)
    images = 60 + 120 * labels.view(-1, 1, 1, 1) + torch.randint(20, (1024, 1, 8, 8), generator=generator)
    ordered = replace(digits, train=Split(images.to(torch.uint8), labels), mean=torch.tensor([0.5]))
    model = net("resnet")
    fit(model, ordered, Recipe(epochs=1, batch_size=64, recalibrate=True))
    first, seen = next(layer for layer in model.modules() if isinstance(layer, _BatchNorm)), []
    first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    evaluate(model, ordered.batches("train", 1024))
    x = seen[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(first.running_var, x.var(1), rtol=0.05, atol=0.0)
    torch.testing.assert_close(first.running_mean, x.mean(1), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_norm_keeps_its_statistics_and_trains_its_scale(digits, name):
    model, met = net(name), []

    def look(model, optimizer, epoch):
        layer = next(layer for layer in model.modules() if isinstance(layer, _BatchNorm))
        met.append((layer.running_mean.clone(), layer.weight.detach().clone()))

    fit(model, digits, Recipe(epochs=3, batch_size=64, freeze_norm=1), callbacks=[look])
    (mean_0, _), (mean_1, scale_1), (mean_2, scale_2) = met
    assert not torch.equal(mean_0, mean_1)
    assert torch.equal(mean_1, mean_2)
    assert not torch.equal(scale_1, scale_2)


def test_mirrored_is_the_mean_of_the_logits_of_both_images(digits):
    model = net("resnet").eval()
    (x, labels), *_ = digits.batches("test", 64)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy((model(x) + model(x.flip(-1))) / 2, labels)
    found = evaluate(model, [(x, labels)], mirrored=True)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.loss == pytest.approx(evaluate(model, [(x.flip(-1), labels)], mirrored=True).loss, rel=1e-5)


def test_mirror_images_of_points_are_refused():
    data = load("moons", seed=0)
    model = build(NetConfig(net="resnet", kind="mlp", depth=8, channels=2, size=None, classes=2), 0)
    with pytest.raises(InvalidInput, match="mirrored averages over an image"):
        fit(model, data, Recipe(epochs=1, mirrored=True))


def test_weights_of_one_epoch_are_not_restored_to_the_dropout_of_another(digits):
    recipe = Recipe(epochs=2, patience=1, dropping=DropoutEpochs(phase="early", epochs=1))
    with pytest.raises(InvalidInput, match="use inverted dropout"):
        fit(net("resnet", dropout=Dropout("unit", 0.2, inverted=False)), digits, recipe)
    for other, inverted in ((recipe, True), (replace(recipe, dropping=DropoutEpochs()), False)):
        fit(net("resnet", dropout=Dropout("unit", 0.2, inverted=inverted)), digits, other)


@pytest.mark.parametrize("settings", [{"recalibrate": True}, {"freeze_norm": 1}])
def test_batch_norms_that_are_not_there_are_refused(digits, settings):
    with pytest.raises(InvalidInput, match="this net has none"):
        fit(net("resnet", norm="group"), digits, Recipe(epochs=2, **settings))


# Dynamo's own, where it leaves a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_training_is_the_same_but_for_rounding():
    data = load("moons", seed=0)
    recipe = Recipe(epochs=1, batch_size=128, lr=0.05)

    def trained(compile):
        model = build(NetConfig(net="resnet", kind="mlp", depth=8, channels=2, size=None, classes=2), 0)
        fit(model, data, recipe, compile=compile)
        return states(model)

    for (name, value), compiled in zip(trained(False).items(), trained(True).values(), strict=True):
        torch.testing.assert_close(compiled, value, rtol=1e-4, atol=1e-5, msg=name)
