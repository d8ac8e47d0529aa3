"""What must hold on a GPU as it does on the CPU; skipped where there is none."""

import pytest
import torch

from resode.nets import Architecture
from resode.stack import Dropout, Stack
from resode.train import Recipe, Setup, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TIMINGS = ("seconds", "images_per_second")


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_deterministic_trainings_from_one_seed_give_the_same_metrics_to_the_last_digit(net, tmp_path):
    setup = Setup(
        architecture=Architecture(net=net, depth=14, width=8, steps=2),
        stack=Stack(dropout=Dropout("unit", 0.1)),
        recipe=Recipe(epochs=2, batch_size=128, deterministic=True),
    )
    runs = [train(setup, tmp_path / name, device="cuda") for name in ("one", "two")]
    one, two = ([{k: v for k, v in record.items() if k not in TIMINGS} for record in run.metrics()] for run in runs)
    assert one == two
    assert runs[0].result("train")["test"] == runs[1].result("train")["test"]
