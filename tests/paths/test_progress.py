"""An analysis that was interrupted goes on to the same numbers, and to those of no other analysis."""

import json
import os
from dataclasses import replace

import pytest
import torch
from by_hand import batches, net_of, view_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resode import InvalidInput, ResidualBlock, ResidualDynamics, dynamics, solver_settings
from resode.paths import delete, lesion, noise, progress, scale, swap
from resode.paths.interventions import Intervention

SIZES = (4, 3, 5, 2)
NET = net_of("basic")
VIEW, DATA = view_of(NET), batches("basic", SIZES)


@pytest.fixture(autouse=True)
def _every_batch_is_written(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)


def until(data, count):
    """The first ``count`` batches, and then the user's ^C."""
    yield from data[:count]
    raise KeyboardInterrupt


def interrupt(path, analysis=lesion.single, view=VIEW, data=DATA, after=2, **how):
    """Leave a file that holds the sums of ``after`` batches."""
    with pytest.raises(KeyboardInterrupt):
        analysis(view, until(data, after), resume=path, **how)


ANALYSES = {
    "single": (lesion.single, {}),
    "stage": (lesion.stage, {"by_class": True}),
    "multiple": (lesion.multiple, {"most": 2, "draws": 2}),
    "permute": (lesion.permute, {"numbers": (3,), "draws": 3, "streams": 2}),
    "interventions": (lesion.interventions, {"changes": [noise(0.2, 1), scale(0.5, stage=1), swap(0, 2)]}),
}


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interrupted_analysis_goes_on_to_the_very_same_numbers(tmp_path, name, after):
    analysis, how = ANALYSES[name]
    path = tmp_path / "progress.json"
    expected = analysis(VIEW, DATA, **how)
    interrupt(path, analysis, after=after, **how)
    assert json.loads(path.read_text())["batches"] == after
    assert analysis(VIEW, iter(DATA), resume=path, **how) == expected
    assert list(tmp_path.iterdir()) == []


def test_only_the_batches_that_remain_are_evaluated(tmp_path):
    seen = []
    block = next(module for module in NET.modules() if isinstance(module, ResidualBlock))
    handle = block.branch.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[1])))
    try:
        interrupt(tmp_path / "p", after=3)
        assert seen == list(SIZES[:3])  # the first block is run once a batch
        seen.clear()
        lesion.single(VIEW, DATA, resume=tmp_path / "p")
        assert seen == list(SIZES[3:])
    finally:
        handle.remove()


def test_it_can_be_interrupted_many_times_and_in_the_midst_of_a_batch(tmp_path):
    path, expected, calls = tmp_path / "p", lesion.single(VIEW, DATA), []

    def stop(module, inputs):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    last = [module for module in NET.modules() if isinstance(module, ResidualBlock)][-1]
    handle, done = last.branch.register_forward_pre_hook(stop), []
    try:
        for _ in range(10):
            calls.clear()
            try:
                found = lesion.single(VIEW, DATA, resume=path)
                break
            except KeyboardInterrupt:
                done.append(json.loads(path.read_text())["batches"])
    finally:
        handle.remove()
    assert found == expected
    # The last block is run 9 times a batch: three are done, and some networks of the fourth, which is done anew.
    assert done == [3]


def test_the_file_is_not_written_oftener_than_said(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 3600.0)
    interrupt(tmp_path / "p", after=3)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "p", [], os.fsync

    def dying(descriptor):
        synced.append(1)
        if len(synced) == 4:
            raise KeyboardInterrupt
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with pytest.raises(KeyboardInterrupt):
            lesion.single(VIEW, DATA, resume=path)
    held = json.loads(path.read_text())
    assert held["batches"] in (1, 2)
    assert [each.name for each in tmp_path.iterdir()] == ["p"]
    assert lesion.single(VIEW, DATA, resume=path) == lesion.single(VIEW, DATA)


def test_without_an_interrupt_nothing_stays_and_no_folder_needs_to_be_there(tmp_path):
    path = tmp_path / "a" / "b" / "p"
    assert lesion.single(VIEW, DATA, resume=str(path)) == lesion.single(VIEW, DATA)
    assert list(path.parent.iterdir()) == []


def test_after_the_last_batch_was_written_the_sums_are_all_that_is_needed(tmp_path):
    path = tmp_path / "p"
    interrupt(path, after=len(DATA))
    assert lesion.single(VIEW, DATA, resume=path) == lesion.single(VIEW, DATA)
    # More data after those gone through are gone through.
    interrupt(path, after=2)
    assert lesion.single(VIEW, DATA[:3], resume=path) == lesion.single(VIEW, DATA[:3])


def test_errors_by_class_may_be_asked_for_later(tmp_path):
    interrupt(tmp_path / "p")
    found = lesion.single(VIEW, DATA, resume=tmp_path / "p", by_class=True, streams=3)
    assert found.baseline == lesion.single(VIEW, DATA, by_class=True).baseline
    assert found.baseline.by_class is not None


def test_a_loader_in_its_order_goes_on(tmp_path):
    x, labels = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    loader = DataLoader(TensorDataset(x, labels), batch_size=5)
    interrupt(tmp_path / "p", data=list(loader), after=2)
    assert lesion.single(VIEW, loader, resume=tmp_path / "p") == lesion.single(VIEW, loader)


def test_the_bar_begins_where_the_analysis_does(tmp_path, monkeypatch):
    from resode.paths import study

    bars = []

    class Bar(study.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(study, "tqdm", Bar)
    interrupt(tmp_path / "p", after=3)
    lesion.single(VIEW, DATA, resume=tmp_path / "p")
    assert [(bar["initial"], bar["total"]) for bar in bars] == [(0, None), (3 * 10, 4 * 10)]


# Another analysis


def changed_parameter(net):
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-7
    return dynamics(net)


def changed_buffer(net):
    next(buffer for name, buffer in net.named_buffers() if "running_mean" in name).view(-1)[0] += 1e-7
    return dynamics(net)


OTHERS = {
    "another parameter": (lambda: changed_parameter(net_of("basic")), lesion.single, {}),
    "another buffer": (lambda: changed_buffer(net_of("basic")), lesion.single, {}),
    "another precision": (lambda: dynamics(net_of("basic").float().double()), lesion.single, {}),
    "another net": (lambda: dynamics(net_of("basic", scale=0.5)), lesion.single, {}),
    "a scaled net": (lambda: scale(0.5, 1)(VIEW), lesion.single, {}),
    "a lesioned net": (lambda: delete(0)(VIEW), lesion.single, {}),
    "a noisy net": (lambda: noise(0.1, 1)(VIEW), lesion.single, {}),
    "another order": (lambda: swap(0, 1)(VIEW), lesion.single, {}),
    "another analysis": (lambda: VIEW, lesion.multiple, {"most": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_analysis_is_refused_and_its_file_left(tmp_path, name):
    view, analysis, how = OTHERS[name]
    interrupt(tmp_path / "p")
    held = (tmp_path / "p").read_bytes()
    with pytest.raises(InvalidInput, match=r"p holds the progress of another analysis .*remove it"):
        analysis(view(), DATA, resume=tmp_path / "p", **how)
    assert (tmp_path / "p").read_bytes() == held


@pytest.mark.parametrize(
    ("analysis", "one", "other"),
    [
        (lesion.multiple, {"most": 1, "draws": 2}, {"most": 1, "draws": 3}),
        (lesion.multiple, {"most": 1, "seed": 0}, {"most": 1, "seed": 1}),
        (lesion.permute, {"numbers": (6,), "stage": 0, "seed": 0}, {"numbers": (6,), "stage": 0, "seed": 1}),
        (lesion.interventions, {"changes": {"x": scale(0.5, 1)}}, {"changes": {"x": scale(0.5000001, 1)}}),
        (lesion.interventions, {"changes": {"x": noise(0.5, 1)}}, {"changes": {"x": noise(0.5, 1, seed=1)}}),
        (lesion.interventions, {"changes": {"x": swap(0, 1)}}, {"changes": {"x": swap(0, 2) >> swap(0, 1)}}),
        (lesion.interventions, {"changes": {"x": swap(0, 1)}}, {"changes": {"y": swap(0, 1)}}),
    ],
)
def test_other_settings_are_refused(tmp_path, analysis, one, other):
    interrupt(tmp_path / "p", analysis, **one)
    with pytest.raises(InvalidInput, match="another analysis"):
        analysis(VIEW, DATA, resume=tmp_path / "p", **other)
    analysis(VIEW, DATA, resume=tmp_path / "p", **one)


def test_two_orders_of_the_same_steps_are_two_analyses(tmp_path):
    first = Intervention("cycle", lambda view: (swap(0, 1) >> swap(1, 2))(view))
    other = Intervention("cycle", lambda view: (swap(1, 2) >> swap(0, 1))(view))
    assert {i for i, step in enumerate(first(VIEW).steps) if step is not VIEW.steps[i]} == {0, 1, 2}
    interrupt(tmp_path / "p", lesion.interventions, changes=[first])
    with pytest.raises(InvalidInput, match="another analysis"):
        lesion.interventions(VIEW, DATA, resume=tmp_path / "p", changes=[other])


def test_another_solver_or_grid_of_the_same_parameters_is_another_network(tmp_path):
    net, data = net_of("midpoint"), batches("midpoint", SIZES)
    interrupt(tmp_path / "p", view=dynamics(net), data=data)
    for settings in ({"solver": "heun"}, {"steps": 3}):
        with solver_settings(net, **settings), pytest.raises(InvalidInput, match="another analysis"):
            lesion.single(dynamics(net), data, resume=tmp_path / "p")
    interrupt(tmp_path / "q", lesion.stage, dynamics(net, grid=(0, 0.5, 1)), data)
    with pytest.raises(InvalidInput, match="another analysis"):
        lesion.stage(dynamics(net, grid=(0, 0.50001, 1)), data, resume=tmp_path / "q")


def test_a_view_without_its_model_cannot_be_resumed(tmp_path):
    view = ResidualDynamics(VIEW.stem, VIEW.steps, VIEW.head)
    with pytest.raises(InvalidInput, match="a view without its model cannot be told from another"):
        lesion.single(view, DATA, resume=tmp_path / "p")


def test_a_fingerprint_is_the_same_in_another_object_of_the_same_network():
    def of(view, change):
        return progress.fingerprint(view, [change(view).steps], ["x"])

    change = scale(0.25, 3) >> noise(0.5, stage=2) >> swap(0, 1)
    assert of(view_of(net_of("basic")), change) == of(VIEW, change)
    assert of(view_of(net_of("basic").train()), change) == of(VIEW, change)
    assert of(view_of(net_of("midpoint")), delete(1)) == of(view_of(net_of("midpoint")), delete(1))


# Other data


def reordered_data():
    return [DATA[1], DATA[0], *DATA[2:]]


def relabelled():
    x, labels = DATA[1]
    return [DATA[0], (x, (labels + 1) % 4), *DATA[2:]]


def moved():
    (x, labels), rest = DATA[0], DATA[1:]
    return [(x + 1e-9, labels), *rest]


def regrouped():
    x, labels = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    return list(zip(x.split(5), labels.split(5), strict=True))


@pytest.mark.parametrize("other", [reordered_data, relabelled, moved, regrouped])
def test_other_data_are_refused(tmp_path, other):
    interrupt(tmp_path / "p")
    held = (tmp_path / "p").read_bytes()
    with pytest.raises(InvalidInput, match=r"p is of other data .*give the same, or remove the file"):
        lesion.single(VIEW, other(), resume=tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == held


def test_fewer_batches_are_refused(tmp_path):
    interrupt(tmp_path / "p", after=3)
    with pytest.raises(InvalidInput, match="is of 3 batches, and the data have 2: give the same"):
        lesion.single(VIEW, DATA[:2], resume=tmp_path / "p")


def test_the_same_bytes_in_another_shape_are_other_data():
    x, labels = torch.arange(6.0), torch.zeros(2)
    digests = {
        progress._digest("", part, labels) for part in (x.view(2, 3), x.view(3, 2), x.view(2, 3).view(torch.int32))
    }
    assert len(digests) == 3


# Damaged files


def cut(held):
    return held[: len(held) // 2]


def without_key(name):
    return lambda held: json.dumps({key: value for key, value in json.loads(held).items() if key != name})


def with_tallies(change):
    def damage(held):
        held = json.loads(held)
        change(held["tallies"])
        return json.dumps(held)

    return damage


DAMAGES = {
    "empty": lambda held: "",
    "cut": cut,
    "no JSON": lambda held: "hello",
    "no object": lambda held: "[1, 2]",
    "a number": lambda held: "3",
    "no fingerprint": without_key("fingerprint"),
    "no batches": without_key("batches"),
    "no digest": without_key("digest"),
    "no sums": without_key("tallies"),
    "batches in words": lambda held: held.replace('"batches": 2', '"batches": "two"'),
    "a sum is missing": with_tallies(lambda tallies: tallies.pop("loss")),
    "a sum of words": with_tallies(lambda tallies: tallies.update(loss=["a"] * 10)),
    "sums of no shape": with_tallies(lambda tallies: tallies["wrong"][0].pop()),
    "sums of fewer networks": with_tallies(lambda tallies: tallies["wrong"].pop()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, name):
    path = tmp_path / "p"
    interrupt(path)
    path.write_text(DAMAGES[name](path.read_text()))
    with pytest.raises(InvalidInput, match=r"p is no progress of an analysis .*remove it, or name another file"):
        lesion.single(VIEW, DATA, resume=path)


def test_a_folder_or_bytes_in_place_of_the_file_are_refused(tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe\x00")):
        path = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        make(path)
        with pytest.raises(InvalidInput, match="is no progress of an analysis"):
            lesion.single(VIEW, DATA, resume=path)


def test_a_model_may_hold_numbers_of_every_type():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            for i, dtype in enumerate((torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float16)):
                self.register_buffer(f"b{i}", torch.ones((), dtype=dtype))
            self.register_buffer("none", torch.zeros(0, 3))
            self.register_buffer("strided", torch.arange(6.0).view(2, 3).T)

    steps = [replace(step) for step in VIEW.steps]
    first = ResidualDynamics(VIEW.stem, steps, VIEW.head, Holder())
    assert progress.fingerprint(first, [], 0) == progress.fingerprint(first.with_steps(VIEW.steps), [], 0)
    first.model.b0.add_(1)
    assert progress.fingerprint(first, [], 0) != progress.fingerprint(first.with_steps(steps), [], 1)


def test_a_scale_for_each_channel_tells_an_analysis_from_another(tmp_path):
    def scaled_by(last):
        factors = torch.tensor([1.0, 1.0, 0.5, last], dtype=torch.float64).view(4, 1, 1)
        return VIEW.with_steps([replace(VIEW.steps[0], scale=factors), *VIEW.steps[1:]])

    path = tmp_path / "p"
    interrupt(path, view=scaled_by(0.5))
    with pytest.raises(InvalidInput, match="another analysis"):
        lesion.single(scaled_by(2.0), DATA, resume=path)
    assert lesion.single(scaled_by(0.5), DATA, resume=path) == lesion.single(scaled_by(0.5), DATA)
