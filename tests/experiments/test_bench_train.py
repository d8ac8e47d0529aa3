"""The trainer's benchmark: all contenders do the same work, and the plain loop is what it says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import bench_train
from experiments.bench import trainers
from experiments.bench.plain_loop import Images, make_loader, train_epoch, train_plainly
from experiments.bench.trainers import BARE, FIT, PLAIN, PROJECTED, TIMM, Contender, bare, contenders, fitted
from experiments.bench_train import CONFIGS, Config, Differs, check_alike, ratios, run
from resode import data as datasets
from resode.data.dataset import DataSet
from resode.errors import InvalidInput, TrainingError
from resode.nets import build
from resode.nets.net import parameter_count
from resode.runs import Run

NETS = ("resnet", "odenet")


def subject(net="resnet", **settings):
    given = {"nets": (net,), **settings}
    return next(iter(replace(CONFIGS["smoke"], **given).subjects().values()))


def small(channels=3, count=6, size=(9, 10)):
    """Random images of so many channels."""
    one = subject()
    net = replace(one.net, channels=channels, size=size)
    return replace(one, net=net, steps=1, recipe=replace(one.recipe, batch_size=count)).data


def changes(data, index):
    """What standard augmentation can make of an image: (2·81, C, H, W), standardized."""
    padded = F.pad(data.train.inputs[index].float() / 255, (4,) * 4)
    H, W = data.size
    crops = torch.stack([padded[:, i : i + H, j : j + W] for i in range(9) for j in range(9)])
    return (torch.cat([crops, crops.flip(-1)]) - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)


def nearest(x, data, index):
    """The number of that one which is ``x``.

    None is when it differs by more than rounding.
    """
    off = (changes(data, index) - x).flatten(1).abs().amax(1)
    return int(off.argmin()) if off.min() < 1e-5 else None


# The plain loop's images


@pytest.mark.parametrize("channels", [1, 3])
def test_an_item_is_the_image_cropped_flipped_and_standardized(channels):
    data = small(channels)
    images = Images(data)
    torch.manual_seed(0)
    found = []
    for _ in range(60):
        x, label = images[2]
        assert label == data.train.labels[2]
        assert x.shape == data.train.inputs.shape[1:]
        found.append(nearest(x, data, 2))
    assert None not in found
    assert len(set(found)) > 30  # 162 there are
    assert {i % 81 // 9 for i in found} == {i % 9 for i in found} == set(range(9))
    assert 15 < sum(i >= 81 for i in found) < 45


def test_an_epoch_has_every_image_once_but_for_those_of_a_last_smaller_batch():
    data = small(count=11)
    loader = make_loader(data, 4, workers=0, seed=0, device="cpu")
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert [x.shape for x, _ in batches] == [(4, 3, 9, 10)] * 2
        x, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        found = [next(i for i in range(11) if nearest(one, data, i) is not None) for one in x]
        assert len(set(found)) == 8
        assert torch.equal(labels, data.train.labels[found])
        orders.append(found)
    assert orders[0] != orders[1]


def test_workers_give_the_batches_of_the_same_order_and_stay():
    data = small(count=8)
    here, there = (make_loader(data, 4, workers=workers, seed=3, device="cpu") for workers in (0, 2))
    processes = []
    for _ in range(2):
        for (x, labels), (_, expected) in zip(there, here, strict=True):
            assert torch.equal(labels, expected)
            assert all(any(nearest(one, data, i) is not None for i in range(8)) for one in x)
        processes.append([process.pid for process in there._iterator._workers])
    assert processes[0] == processes[1]
    assert len(processes[0]) == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Images(datasets.load("moons")), "moons has points"),
        (lambda: Images(small(channels=2)), "2 channels"),
        (lambda: make_loader(small(), 7, workers=0, seed=0, device="cpu"), "batch_size is 7"),
        (lambda: make_loader(small(), 0, workers=0, seed=0, device="cpu"), "batch_size is 0"),
        (lambda: make_loader(small(), 2, workers=-1, seed=0, device="cpu"), "workers is -1"),
        (lambda: plainly(nn.Identity(), epochs=0), "epochs is 0"),
        (lambda: train_epoch(nn.Identity(), None, [], device="cpu"), "no batch"),
    ],
)
def test_bad_input_is_refused(make, said):
    with pytest.raises(InvalidInput, match=said):
        make()


# The plain loop's training


def plainly(model, **settings):
    given = {
        "epochs": 2,
        "batch_size": 4,
        "lr_of_step": lambda step: 0.1 / (step + 1),
        "weight_decay": 0.05,
        "momentum": 0.9,
        "workers": 0,
        "seed": 5,
        "device": "cpu",
        "progress": False,
    }
    return train_plainly(model, small(count=9, size=(8, 8)), **(given | settings))


def net(name):
    return build(subject(name).net, seed=0)


@pytest.mark.parametrize("name", NETS)
def test_plain_training_is_sgd_with_all_parameters_decaying(name):
    model, other = net(name), net(name)
    before = torch.get_rng_state()
    records = plainly(model)
    assert torch.equal(torch.get_rng_state(), before)

    parameters = list(other.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    step, losses = 0, []
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        loader = make_loader(small(count=9, size=(8, 8)), 4, workers=0, seed=5, device="cpu")
        for _ in range(2):
            for x, labels in loader:
                loss = F.cross_entropy(other(x), labels)
                losses.append(loss.item())
                for p, m, g in zip(parameters, momenta, torch.autograd.grad(loss, parameters), strict=True):
                    m.mul_(0.9).add_(g + 0.05 * p.detach())
                    p.data -= 0.1 / (step + 1) * m
                step += 1
    for mine, expected in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, expected)
    assert [r["train_loss"] for r in records] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    assert [r["lr"] for r in records] == [0.1 / 2, 0.1 / 4]
    assert [r["epoch"] for r in records] == [1, 2]
    assert all(r["nfe"] > 0 and r["images_per_second"] == pytest.approx(8 / r["seconds"]) for r in records)


def test_accuracy_is_the_share_of_right_answers():
    labels = torch.tensor([0, 1, 2, 1])
    model = nn.Linear(3, 3, bias=False)
    model.weight.data = torch.eye(3)
    answers = [torch.eye(3)[labels], torch.eye(3)[(labels + 1) % 3]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told = []
    found = train_epoch(
        model, optimizer, [(x, labels) for x in answers], device="cpu", after_step=lambda *said: told.append(said)
    )
    losses = [float(F.cross_entropy(x, labels)) for x in answers]
    assert found == (pytest.approx(sum(losses) / 2), 0.5)
    assert told == [(4, pytest.approx(losses[0]), 1.0), (4, pytest.approx(sum(losses) / 2), 0.5)]


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(TrainingError, match="the loss became"):
        plainly(net("resnet"), lr_of_step=lambda step: 1e30)


def test_an_epoch_is_in_the_precision_and_the_layout_asked_for():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.layout, out = x.stride(1) == 1, self.conv(x)
            self.dtype = out.dtype
            return out.mean((2, 3))

    batches = [(torch.randn(2, 3, 5, 5), torch.tensor([0, 1]))]
    for settings, expected in (
        ({}, (False, torch.float32)),
        ({"precision": "bfloat16", "channels_last": True}, (True, torch.bfloat16)),
    ):
        model = Seen()
        train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, device="cpu", **settings)
        assert (model.layout, model.dtype) == expected
        assert model.conv.weight.grad.dtype == torch.float32


# The same work


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_fit_and_the_bare_step_train_the_same_net_on_the_same_batches(name, channels_last, monkeypatch):
    one, shown = subject(name, steps=3, lr=0.1, channels_last=channels_last), []
    batches = DataSet.batches

    def recorded(*args, **settings):
        for x, labels in batches(*args, **settings):
            shown.append((x, labels))
            yield x, labels

    monkeypatch.setattr(DataSet, "batches", recorded)
    ours = fitted(one)
    start = [p.detach().clone() for p in ours.model.parameters()]
    ours()
    assert len(shown) == 3
    other = bare(one, BARE, one.built(), shown)
    other()
    for a, b, before in zip(ours.model.parameters(), other.model.parameters(), start, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, before)
        assert a.stride() == b.stride()
    assert channels_last == (ours.model.stem[1].weight.stride(1) == 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_every_turn_trains_on_as_many_images_in_training_mode(name, precision):
    one, seen = subject(name, precisions=(precision,)), []
    there = contenders(one, (0,))
    assert [each.name for each in there][:3] == [BARE, FIT, f"{PLAIN}, 0 workers"]
    check_alike(there)
    for each in there:
        each.model.register_forward_pre_hook(lambda model, args: seen.append((len(args[0]), model.training)))
        for _ in range(2):
            seen.clear()
            each()
            assert seen == [(4, True)] * 2
            assert sum(count for count, _ in seen) == one.images
        assert len(each.losses) == 2


def test_the_bare_steps_batches_are_augmented_and_standardized_images_of_the_set(monkeypatch):
    one, seen = subject(), []
    each = bare(one, BARE, one.built())
    each.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    each()
    found = [[i for i in range(one.images) if nearest(x, one.data, i) is not None] for x in torch.cat(seen)]
    assert sorted(found) == [[i] for i in range(one.images)]


def test_timms_net_is_ours_with_projections():
    pytest.importorskip("timm")
    one = subject(depth=14, width=6)
    config = replace(one.net, shortcut="projection")
    ours, theirs = build(config, seed=0), trainers.timm_net(one.net, seed=0)
    assert parameter_count(ours) == parameter_count(theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(theirs(x), ours(x))
    again, otherwise = (trainers.timm_net(one.net, seed=seed) for seed in (0, 1))
    assert torch.equal(again.conv1.weight, trainers.timm_net(one.net, seed=0).conv1.weight)
    assert not torch.equal(again.conv1.weight, otherwise.conv1.weight)


def test_timms_net_stands_beside_residual_nets_alone_and_where_it_is_installed(monkeypatch):
    pytest.importorskip("timm")
    assert [each.name for each in contenders(subject(), ())][2:] == [PROJECTED, TIMM]
    assert len(contenders(subject("odenet"), ())) == 2
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    assert len(contenders(subject(), ())) == 2


def test_nets_of_other_sizes_and_losses_that_are_not_finite_are_errors():
    one, other = nn.Linear(2, 2), nn.Linear(2, 3)
    first, same, wrong = Contender(BARE, one, float), Contender(FIT, one, float), Contender(FIT, other, float)
    check_alike([first, same])
    with pytest.raises(Differs, match=f"{FIT} trains 9 parameters, and {BARE} 6"):
        check_alike([first, wrong])
    with pytest.raises(Differs, match=TIMM):
        check_alike([first, Contender(PROJECTED, one, float), Contender(TIMM, other, float)])
    with pytest.raises(TrainingError, match=f"{FIT}: the loss of a turn is nan"):
        Contender(FIT, one, lambda: float("nan"))()


# The results


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nets": ("vgg",)}, "vgg"),
        ({"precisions": ("float16",)}, "float16"),
        ({"batch": 1}, "batch is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"width": 5}, "width is 5"),
        ({"workers": (0, -2)}, "workers are"),
        ({"depth": 9}, "depth 9"),
        ({"solver": "no such"}, "no such"),
        ({"lr": -1.0}, "lr is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_run(settings, said):
    with pytest.raises(InvalidInput, match=said):
        Config(**settings)


def row(way, seconds):
    return {"way": way, "seconds": {"median": sorted(seconds)[1]}, "rounds": seconds}


def test_a_ratio_is_of_the_speed_of_the_first_to_that_of_the_second():
    rows = [row(BARE, [1.0, 1.0, 1.5]), row(FIT, [2.0, 1.25, 3.0]), row(f"{PLAIN}, 2 workers", [4.0, 4.0, 3.0])]
    over_bare, over_plain = ratios(rows)
    assert over_bare == {"of": FIT, "over": BARE, "ratio": 0.5, "min": 0.5, "max": 0.8, "n": 3}
    assert over_plain["over"] == f"{PLAIN}, 2 workers"
    assert (over_plain["ratio"], over_plain["min"], over_plain["max"]) == (2.0, 1.0, 3.2)


@pytest.mark.parametrize("absent", [None, "not installed"])
def test_a_smoke_run_says_what_was_measured_and_who_is_missing(absent, tmp_path, monkeypatch):
    for module in (trainers, bench_train):
        monkeypatch.setattr(module, "timm_absent", lambda: absent)
    if absent is None:
        pytest.importorskip("timm")
    with Run.create(tmp_path / "run", {}) as folder:
        run(CONFIGS["smoke"], folder)
        folder.finish()
    found = folder.result("bench")
    assert [case["case"].partition(",")[0] for case in found["cases"]] == ["ResNet-8", "ODE net"]
    residual, ode = ([each["way"] for each in case["rows"]] for case in found["cases"])
    assert ode == [BARE, FIT, f"{PLAIN}, 0 workers"]
    assert residual == ode + ([PROJECTED, TIMM] if absent is None else [])
    for case in found["cases"]:
        for each in case["rows"]:
            assert each["images_per_second"]["n"] == 1
            assert each["images_per_second"]["median"] == pytest.approx(8 / each["seconds"]["median"])
            assert each["first_loss"] > 0
        assert {(each["of"], each["over"]) for each in case["ratios"]} >= {(FIT, BARE), (FIT, f"{PLAIN}, 0 workers")}
    said = (folder.path / "table.md").read_text()
    assert said.startswith("timm: skipped, not installed") == (absent is not None)
    assert f"| {BARE} | 5,006 |" in said


def test_another_net_is_an_error_before_anything_is_measured(tmp_path, monkeypatch):
    real = trainers.fitted
    monkeypatch.setattr(trainers, "fitted", lambda one: real(replace(one, net=replace(one.net, depth=14))))
    monkeypatch.setattr(bench_train.turns, "rows", None)
    with Run.create(tmp_path / "run", {}) as folder, pytest.raises(Differs, match="they must be as many"):
        run(CONFIGS["smoke"], folder)
