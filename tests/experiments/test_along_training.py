"""Looks along a training: before each epoch and at the end, and the same when it was interrupted."""

import pytest
import torch

from experiments.training import trained
from resode import nets
from resode.data.sets import load
from resode.train.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=256, lr=0.02)


def train(folder, look):
    model = nets.resnet(8, width=4, channels=1, size=(8, 8))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return trained(folder, {"a": 1}, model, load("digits"), RECIPE, along=look)


class Look:
    """Notes the sum of the weights; interrupted before the look number ``stop``."""

    def __init__(self, stop=None):
        self.stop, self.count = stop, 0

    def __call__(self, model):
        if self.count == self.stop:
            raise KeyboardInterrupt
        self.count += 1
        return {"sum": sum(float(p.detach().double().sum()) for p in model.parameters())}


def test_it_looks_before_each_epoch_and_at_the_end(tmp_path, capsys):
    look = Look()
    whole = train(tmp_path / "whole", look)["along"]
    assert look.count == len(whole) == RECIPE.epochs + 1
    assert len({seen["sum"] for seen in whole}) == len(whole)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Look(stop=2))
    rest = Look()
    assert train(tmp_path / "parts", rest)["along"] == whole
    assert rest.count == 2


def test_a_training_that_diverges_has_the_looks_before(tmp_path, monkeypatch, capsys):
    from resode.errors import TrainingError

    def diverging(model, *args, callbacks, **options):
        for epoch in range(2):
            callbacks[0](model, None, epoch)
        raise TrainingError("the loss became nan")

    monkeypatch.setattr("experiments.training.fit", diverging)
    found = train(tmp_path / "run", Look())
    assert found["diverged"] == "the loss became nan"
    assert len(found["along"]) == 2
