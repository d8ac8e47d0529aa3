"""An ODE block is an ordinary module: copies, averages, files, and data-parallel processes."""

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resode.blocks import GRADIENTS, Branch, ODEBlock
from resode.stack import Dropout, Stack

every_mode = pytest.mark.parametrize("gradient", GRADIENTS)


def net_of(gradient="backprop", solver="rk4", **settings):
    torch.manual_seed(0)
    stack = Stack(activation="tanh", conv="weight-standardized", dropout=Dropout("unit", 0.3))
    settings = settings or {"steps": 3}
    block = ODEBlock(Branch(4, stack, time="concat"), solver, gradient=gradient, **settings)
    return nn.Sequential(nn.Conv2d(2, 4, 3), block, nn.Flatten(), nn.Linear(64, 3)).double()


def state(seed=1):
    return torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(net, x=None):
    torch.manual_seed(2)
    loss = net(state() if x is None else x).square().mean()
    return torch.autograd.grad(loss, tuple(net.parameters()))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- copies ----------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_deep_copy_is_the_same_net_and_shares_nothing(solver, gradient):
    net = net_of(gradient, solver, **({"steps": 3} if solver == "rk4" else {"rtol": 1e-3}))
    gradients(net)
    twin = copy.deepcopy(net)
    assert equal(gradients(twin), gradients(net))
    assert equal(twin.buffers(), net.buffers())
    stats = copy.copy(net[1].stats)
    before = [value.clone() for value in net.state_dict().values()]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    twin(state(7))
    assert equal(net.state_dict().values(), before)
    assert net[1].stats == stats


@every_mode
def test_a_copy_made_between_forward_and_backward_changes_neither(gradient):
    """As an average of the weights is taken, or a snapshot for a later comparison."""
    net = net_of(gradient)
    expected = gradients(net)
    torch.manual_seed(2)
    loss = net(state()).square().mean()
    twin = copy.deepcopy(net)
    gradients(twin, state(7))
    assert equal(torch.autograd.grad(loss, tuple(net.parameters())), expected)


@every_mode
def test_a_pickled_net_is_the_same_net(gradient):
    net = net_of(gradient)
    gradients(net)
    other = pickle.loads(pickle.dumps(net))
    assert equal(gradients(other), gradients(net))


# --- averages --------------------------------------------------------------------------------------------------------


@every_mode
def test_an_average_of_the_weights_is_made_and_evaluated_by_torchs_own_means(gradient):
    net, decay = net_of(gradient), 0.9
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = None
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        net(state(step)).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
        now = [p.detach().clone() for p in net.parameters()]
        pairs = zip(expected or now, now, strict=True)
        expected = [decay * old + (1.0 - decay) * new for old, new in pairs]
    for found, by_hand in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    average.eval()
    twin = net_of(gradient).eval()
    twin.load_state_dict(average.module.state_dict())
    assert torch.equal(average(state()), twin(state()))
    assert not torch.equal(average(state()), net.eval()(state()))
    assert (average.module[1].stats.nfe_forward, net[1].stats.nfe_forward) == (
        12 if gradient != "reversible" else 24,
    ) * 2


# --- files -----------------------------------------------------------------------------------------------------------


@every_mode
def test_a_saved_state_is_loaded_without_unpickling_code_and_gives_the_same_net(gradient, tmp_path):
    net = net_of(gradient)
    gradients(net)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = net_of(gradient)
    assert not torch.equal(other.eval()(state()), net.eval()(state())), "running statistics were gathered"
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other(state()), net(state()))
    assert equal(gradients(other.train()), gradients(net.train()))


def test_the_state_of_a_block_is_that_of_its_branch_whatever_its_settings():
    """So that a net can be loaded with another solver, gradient mode or compiled."""
    keys = {
        tuple(net_of(gradient, **settings).state_dict())
        for gradient in GRADIENTS
        for settings in ({"steps": 3}, {"steps": 5}, {"steps": 3, "compile": True}, {"steps": 3, "coupling": 0.9})
    }
    assert len(keys) == 1
    assert all("1.branch." in key for key in next(iter(keys)) if key.startswith("1."))


def test_a_solve_leaves_nothing_on_the_module():
    """The context of a solve is held by its graph: what is pickled does not grow, and the memory is free again."""

    def size(net):
        file = io.BytesIO()
        torch.save(net, file)
        return file.tell()

    net = net_of("adjoint")
    before = size(net)
    for _ in range(3):
        gradients(net)
    assert size(net) <= before + 64


# --- data-parallel processes -----------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch was built without gloo"
)
def test_two_data_parallel_processes_give_the_gradients_of_the_whole_batch_in_every_mode(tmp_path):
    program = Path(__file__).with_name("data_parallel.py")
    command = [sys.executable, "-W", "error", str(program)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in (0, 1):
            process = subprocess.Popen([*command, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            _, said = process.communicate(timeout=180)
            assert process.returncode == 0, said
    for rank in (0, 1):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert measured.keys() == set(GRADIENTS)
        assert max(measured.values()) < 1e-12
