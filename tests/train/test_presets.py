"""Presets: each is the training that its source describes, builds its net, and trains by name or by its settings."""

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch

from resode import InvalidInput, build
from resode.cli.common import SetupFlags, flags_of_preset
from resode.nets import NetConfig, parameter_count
from resode.train import PRESETS, Data, load, preset, train
from resode.train.averaging import Average
from resode.train.recipe import learning_rate

every_preset = pytest.mark.parametrize("name", PRESETS)
ON = {"mnist": {"channels": 1, "size": (28, 28)}, "cifar10": {"channels": 3, "size": (32, 32)}}


def net_of(setup):
    """The net of a preset for the images of its data."""
    return build(NetConfig(**vars(setup.architecture), stack=setup.stack, **ON[setup.data.data]), seed=0)


@every_preset
def test_a_preset_says_its_source_what_to_expect_and_how_long_it_takes(name):
    said = inspect.getdoc(PRESETS[name])
    for word in ("Expect:", "Time:", "%", "20"):  # a year
        assert word in said


@every_preset
def test_a_preset_builds_a_net_that_takes_its_images(name):
    setup = preset(name)
    model = net_of(setup)
    shape = (2, ON[setup.data.data]["channels"], *ON[setup.data.data]["size"])
    assert model(torch.rand(shape)).shape == (2, 10)
    images = torch.randint(256, shape, dtype=torch.uint8)
    augmented = setup.stack.augment(images, torch.Generator().manual_seed(0), index=torch.arange(2), epoch=0)
    assert augmented.shape == shape


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(InvalidInput, match=r"unknown preset 'he2015'.*he2016, lecture, fast, strikes-back-a3, odenet"):
        preset("he2015")


@every_preset
def test_a_preset_is_a_training_that_another_data_set_can_have(tmp_path, name):
    setup = preset(name)
    epochs = 1 if not setup.recipe.warmup else 2
    short = replace(
        setup,
        architecture=replace(setup.architecture, width=4, depth=8, blocks=2, convs=1),
        stack=replace(setup.stack, augment=replace(setup.stack.augment, alternate_flip=False, shift=0)),
        data=Data(data="digits"),
        recipe=replace(setup.recipe, epochs=epochs, warmup=min(1.0, setup.recipe.warmup), batch_size=510),
    )
    run = train(short, tmp_path / "run")
    assert len(run.metrics()) == epochs
    assert not load(run.path).model.training


# --- what the sources say -------------------------------------------------------------------------------------------


def test_he2016_is_the_training_of_section_4_2():
    setup = preset("he2016")
    assert parameter_count(net_of(setup)) == 269_722
    assert len(setup.recipe.milestones) == 2
    recipe, steps = setup.recipe, 50_000 // setup.recipe.batch_size
    rates = [learning_rate(recipe, step, steps) for step in range(recipe.epochs * steps)]
    assert abs(len(rates) - 64_000) < steps
    falls = [next(i for i, lr in enumerate(rates) if lr < bound) for bound in (0.05, 0.005)]
    assert falls == pytest.approx([32_000, 48_000], abs=steps)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.1, 0.01, 0.001])
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.batch_size) == ("sgd", 0.9, 1e-4, 128)
    assert (setup.stack.augment.flip, setup.stack.augment.crop, setup.data.validation) == (True, 4, 0.0)


def test_lecture_is_adam_for_three_epochs_on_a_grid_of_vgg_nets():
    setup = preset("lecture")
    assert (setup.recipe.optimizer, setup.recipe.epochs, setup.architecture.net) == ("adam", 3, "vgg")
    counts = {
        (blocks, convs): parameter_count(
            net_of(replace(setup, architecture=replace(setup.architecture, blocks=blocks, convs=convs)))
        )
        for blocks in (1, 2, 3)
        for convs in (1, 2, 3)
    }
    for few, more in pairwise((1, 2, 3)):
        assert all(counts[few, n] < counts[more, n] and counts[n, few] < counts[n, more] for n in (1, 2, 3))


def test_fast_uses_the_means_of_airbench():
    recipe, augment = preset("fast").recipe, preset("fast").stack.augment
    assert recipe.nesterov
    assert recipe.schedule == "one-cycle"
    assert recipe.label_smoothing > 0.0
    assert recipe.average == Average(kind="lookahead", decay=0.95**5, every=5, power=3.0)
    assert recipe.mirrored
    assert augment.alternate_flip
    assert augment.shift == 2


def test_strikes_back_a3_has_every_part_of_the_procedure():
    recipe, augment = preset("strikes-back-a3").recipe, preset("strikes-back-a3").stack.augment
    assert (recipe.epochs, recipe.optimizer, recipe.loss, recipe.schedule) == (100, "adamw", "bce", "cosine")
    assert recipe.target_threshold == 0.2
    assert (recipe.warmup, recipe.weight_decay, recipe.repeats, recipe.lr) == (5.0, 0.02, 3, 4e-3)
    assert (augment.flip, augment.resized_crop) == (True, 0.25)
    assert (augment.randaugment, augment.magnitude, augment.mixup, augment.cutmix) == (2, 18, 0.1, 1.0)


def test_odenet_mnist_has_no_more_parameters_than_that_of_chen_et_al():
    setup = preset("odenet-mnist")
    assert 150_000 < parameter_count(net_of(setup)) <= 220_000
    assert setup.architecture.net == "odenet"


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_knows_every_preset():
    optional = get_type_hints(SetupFlags)["preset"]
    assert [name for part in get_args(optional) for name in get_args(part)] == list(PRESETS)


@every_preset
@pytest.mark.parametrize("written", [["--preset", "{}"], ["--preset={}"], ["--preset", "fast", "--preset", "{}"]])
def test_a_preset_stands_for_its_settings(name, written):
    found = flags_of_preset(["--lr", "1", *(part.format(name) for part in written), "--out", "x"])
    assert found.pop("preset") == name
    assert SetupFlags(**found).setup == preset(name)


@pytest.mark.parametrize("arguments", [[], ["--preset"], ["--preset", "he2015"], ["--presets", "fast"]])
def test_what_names_no_preset_stands_for_nothing(arguments):
    assert flags_of_preset(arguments) == {}
