"""What must hold on a GPU as it does on the CPU; skipped where there is none."""

import copy

import pytest
import torch

from resode.blocks import Branch, ODEBlock
from resode.blocks.compiled import begin_graphs
from resode.data.sets import load
from resode.nets import Architecture, NetConfig, build
from resode.stack import Dropout, Stack
from resode.train import Recipe, Setup, fit, train

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


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "reversible", "adjoint"])
def test_steps_as_cuda_graphs_give_the_gradients_of_the_eager_ones_training_step_after_training_step(gradient):
    torch.manual_seed(0)
    eager = ODEBlock(Branch(8, Stack(norm="group"), "preact", "concat"), "rk4", steps=3, gradient=gradient).cuda()
    graphs = copy.deepcopy(eager)
    graphs.compile_mode = "reduce-overhead"
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1) for block in (eager, graphs)]
    for _ in range(4):
        x = torch.randn(4, 8, 6, 6, device="cuda")
        outcomes = []
        for block, optimizer in zip((eager, graphs), optimizers, strict=True):
            optimizer.zero_grad()
            begin_graphs(block.compile_mode, x.device)
            leaf = x.clone().requires_grad_()
            block(block(leaf)).square().mean().backward()
            outcomes.append([leaf.grad.clone(), *(p.grad.clone() for p in block.parameters())])
            optimizer.step()
        for seen, expected in zip(*reversed(outcomes), strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_a_training_by_cuda_graphs_is_the_same_but_for_rounding(net):
    data = load("digits", seed=0, device="cuda")
    recipe = Recipe(epochs=1, batch_size=256, lr=0.01)

    def trained(compile):
        model = build(NetConfig(net=net, depth=8, width=8, steps=2, channels=1, size=(8, 8)), 0).cuda()
        return fit(model, data, recipe, compile=compile)[-1]["train_loss"]

    assert trained("reduce-overhead") == pytest.approx(trained(False), rel=1e-3)
