"""Batch norm over several processes: two processes are one with the whole batch, and what cannot be is refused."""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from resode.blocks import Branch, ODEBlock, ResidualBlock, convert, synchronize
from resode.errors import InvalidInput
from resode.layers import BatchNorm
from resode.layers.synchronized import Processes

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch was built without gloo"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each of two processes measures (see ``synchronized_processes``)."""
    folder = tmp_path_factory.mktemp("processes")
    program = Path(__file__).with_name("synchronized_processes.py")
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in ("0", "1"):
            command = [sys.executable, "-W", "error", str(program), rank, "2", str(folder)]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        said = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@needs_gloo
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("block", ["residual", "backprop", "checkpoint", "reversible", "adjoint"])
def test_two_processes_give_what_one_gives_with_the_whole_batch(measured, block, sizes):
    for found in measured:
        differences = found[f"{block}-{sizes}"]
        assert differences.keys() == {"outputs", "gradients", "statistics"}
        assert max(differences.values()) < 1e-11


def test_without_processes_it_is_refused_in_words():
    for act in (
        lambda: synchronize(nn.Sequential(BatchNorm(3))),
        lambda: BatchNorm(3, synchronized=True)(torch.randn(4, 3)),
        lambda: _block(synchronized=True)(torch.randn(2, 4, 5, 5)),
    ):
        with pytest.raises(InvalidInput, match=r"init_process_group"):
            act()


def _block(synchronized, **options):
    block = ODEBlock(Branch(4), **options)
    for layer in block.modules():
        if synchronized and isinstance(layer, BatchNorm):
            layer.processes = Processes()
    return block


def test_evaluation_and_frozen_statistics_ask_no_other_process():
    x = torch.randn(2, 4, 5, 5)
    block = _block(synchronized=True).eval()
    assert torch.equal(block(x), block(x))
    layer = BatchNorm(4, synchronized=True)
    layer.frozen = True
    torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-4)


def test_a_single_process_computes_as_without_synchronization(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        x = torch.randn(6, 4, 5, 5)
        plain = nn.Sequential(_block(synchronized=False), ResidualBlock(Branch(4)))
        same = copy.deepcopy(plain)
        assert synchronize(same) == 4
        assert torch.equal(plain(x), same(x))
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), same.buffers(), strict=True))
        with pytest.raises(InvalidInput, match=r"1 is torch's BatchNorm2d.*resode\.convert"):
            synchronize(nn.Sequential(BatchNorm(3), nn.BatchNorm2d(3)))
    finally:
        distributed.destroy_process_group()


def test_a_solve_that_chooses_its_steps_is_refused_in_training():
    block, x = _block(synchronized=True, solver="dopri5", rtol=1e-2, atol=1e-2), torch.randn(2, 4, 5, 5)
    for solve in (block, lambda x: block.trajectory(x, [0.5, 1.0])):
        with pytest.raises(InvalidInput, match="give the solver a number of steps"):
            solve(x)
    assert block.eval()(x).shape == x.shape


def test_a_compiled_step_is_refused(monkeypatch):
    monkeypatch.setattr(Processes, "count", lambda self: 2)
    with pytest.raises(InvalidInput, match="compile neither"):
        _block(synchronized=True, solver="euler", steps=2, compile=True)(torch.randn(2, 4, 5, 5))


def test_a_copy_and_the_counterpart_of_torchs_are_synchronized_over_the_same_processes():
    layer = BatchNorm(4, synchronized=True, group=object())
    assert copy.deepcopy(layer).processes is layer.processes
    theirs = nn.SyncBatchNorm(4)
    assert convert(theirs).processes.group is theirs.process_group
    assert convert(nn.BatchNorm2d(4)).processes is None
