"""The modes of torch.compile reach the net and its solves; CUDA graphs are told where a step of training begins."""

import pytest
import torch

from resode import InvalidInput, NetConfig, Recipe, build, fit
from resode.blocks.compiled import COMPILE_MODES, begin_graphs
from resode.blocks.ode import ode_blocks
from resode.data import load
from resode.nets import Architecture
from resode.train import Setup, loop, train

STEPS = 2


@pytest.fixture(scope="module")
def digits():
    data = load("digits", seed=0)
    few = torch.arange(16 * STEPS)
    return type(data)(data.name, data.train.take(few), data.validation, data.test, data.classes, data.mean, data.std)


@pytest.fixture
def compiled(monkeypatch):
    """The modes in which something was compiled; nothing is."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda module, *, mode="default", **_: modes.append(mode) or module)
    return modes


def small(net, **settings):
    return build(NetConfig(net=net, depth=8, width=4, channels=1, size=(8, 8), steps=1, **settings), 0)


@pytest.mark.parametrize(("asked", "mode"), [(True, "default"), *((mode, mode) for mode in COMPILE_MODES)])
def test_fit_compiles_the_net_in_the_mode_it_is_asked_for(asked, mode, digits, compiled):
    fit(small("resnet"), digits, Recipe(epochs=1, batch_size=16), compile=asked)
    assert compiled == [mode]


def test_an_unknown_mode_is_refused_before_anything_is_trained(digits, monkeypatch):
    monkeypatch.setattr(loop, "_fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(InvalidInput, match="mode of compile 'fastest'"):
        fit(small("resnet"), digits, Recipe(epochs=1, batch_size=16), compile="fastest")
    with pytest.raises(InvalidInput, match="compile mode 'fastest'"):
        Architecture(compile=True, compile_mode="fastest")


def test_the_solves_of_a_net_are_compiled_in_the_mode_of_its_settings(tmp_path, compiled):
    for compile, mode in ((True, "reduce-overhead"), (False, None)):
        model = small("odenet", compile=compile, compile_mode="reduce-overhead")
        assert {block.compile_mode for block in ode_blocks(model).values()} == {mode}
    architecture = Architecture(net="resnet", depth=8, width=4, compile=True, compile_mode="reduce-overhead")
    train(Setup(architecture=architecture, recipe=Recipe(epochs=1, batch_size=512)), tmp_path / "run")
    assert compiled == ["reduce-overhead"]


def test_the_graphs_of_a_gpu_are_told_where_a_step_begins_and_no_others(monkeypatch):
    told = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(1))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for mode in (*COMPILE_MODES, True, False, None):
        begin_graphs(mode, cpu)
    for mode in ("default", "max-autotune-no-cudagraphs", True, False, None):
        begin_graphs(mode, gpu)
    assert not told
    for mode in ("reduce-overhead", "max-autotune"):
        begin_graphs(mode, gpu)
    assert len(told) == 2


def test_a_step_begins_without_the_gradients_of_the_last_one(digits, compiled, monkeypatch):
    """Where graphs write the gradients of every step into one place, those of the last must be gone by then."""
    model, seen = small("resnet"), []
    monkeypatch.setattr(loop, "begin_graphs", lambda mode, device: seen.append((mode, device.type)))
    model.register_forward_pre_hook(lambda *_: seen.append([p.grad for p in model.parameters() if p.grad is not None]))
    fit(model, digits, Recipe(epochs=1, batch_size=16), compile="reduce-overhead")
    trained = seen[: 2 * STEPS]  # the net is evaluated afterwards
    assert trained == [("reduce-overhead", "cpu"), []] * STEPS
