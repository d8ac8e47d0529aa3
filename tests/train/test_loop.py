"""The training loop: what one step does, what a seed decides, when it stops, and what an interruption leaves."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from resode import (
    Dropout,
    InvalidInput,
    NetConfig,
    ODEBlock,
    Recipe,
    Run,
    RunError,
    Stack,
    TrainingError,
    build,
    collect_penalties,
    fit,
)
from resode.data import Augment, DataSet, Split, load
from resode.layers import BatchNorm
from resode.train import evaluate
from resode.train.recipe import learning_rate

TIMINGS = ("seconds", "images_per_second")
PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def points(train, validation=None, labels=None, validation_labels=None, classes=2):
    """A data set of points as they are: standardization changes nothing."""

    def split(inputs, labels):
        inputs = torch.as_tensor(inputs, dtype=torch.float32).reshape(len(inputs), -1)
        return Split(inputs, torch.as_tensor(labels, dtype=torch.int64).reshape(len(inputs)))

    held = split(train, torch.zeros(len(train)) if labels is None else labels)
    C = held.inputs.shape[1]
    nothing = Split(torch.zeros(0, C), torch.zeros(0, dtype=torch.int64))
    watched = nothing if validation is None else split(validation, validation_labels)
    return DataSet("points", held, watched, held, classes, torch.zeros(C), torch.ones(C))


def blobs(count=64, validation=32):
    """Two clouds of points that a line tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count + validation) % 2
    inputs = torch.randn(len(labels), 3, generator=generator) + 2.0 * labels[:, None]
    return points(inputs[:count], inputs[count:], labels[:count], labels[count:])


@pytest.fixture(scope="module")
def digits():
    """A few of the digits: 200 to train on, 50 to validate."""
    whole = load("digits", validation=0.2)
    return replace(whole, train=whole.train.take(slice(200)), validation=whole.validation.take(slice(50)))


def net_for(data, net="resnet", seed=0, **settings):
    size = data.size
    kind = {"kind": "mlp", "depth": 8, "steps": 2} if size is None else {"width": 4, "depth": 8, "steps": 1}
    shape = {"size": size, "channels": data.channels, "classes": data.classes}
    return build(NetConfig(net=net, **{**kind, **shape, **settings}), seed)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def interrupt_at(model, at):
    """Interrupt the training of ``model`` from the keyboard in its ``at``-th step."""
    count = []

    def interrupt(module, *_):
        if module.training:
            count.append(1)
            if len(count) == at:
                raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# One step


def test_a_training_learns(digits):
    for net in ("resnet", "odenet"):
        model = net_for(digits, net)
        before = evaluate(model, digits.batches("train", 200))
        records = fit(model, digits, Recipe(epochs=8, batch_size=50, lr=0.05))
        after = evaluate(model, digits.batches("train", 200))
        assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
        assert after.loss < 0.7 * before.loss
        assert after.accuracy > before.accuracy + 0.2


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_first_loss_is_that_of_the_initial_model_smoothed_as_asked(smoothing):
    data, model = blobs(), net_for(blobs(), stack=Stack(norm="none"))
    with torch.no_grad():
        logp = model(data.train.inputs).log_softmax(1)
    own = logp.gather(1, data.train.labels[:, None]).mean()
    expected = -float((1 - smoothing) * own + smoothing * logp.mean())
    hits = float((logp.argmax(1) == data.train.labels).double().mean())
    (record,) = fit(model, data, Recipe(epochs=1, batch_size=64, label_smoothing=smoothing))
    assert record["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["train_accuracy"] == hits


def one_step(**settings):
    """A step of SGD on all of the data: the gradient before it, and the change of each parameter."""
    data, model = blobs(), net_for(blobs(), stack=Stack(norm="none"))
    F.cross_entropy(model(data.train.inputs), data.train.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    fit(model, data, Recipe(epochs=1, batch_size=64, **{**PLAIN, **settings}))
    return gradient, nn.utils.parameters_to_vector(model.parameters()).detach() - before


def test_a_step_of_sgd_is_minus_lr_times_the_gradient():
    gradient, change = one_step(lr=0.5)
    torch.testing.assert_close(change, -0.5 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_large_gradient_is_clipped_to_its_norm_and_a_small_one_left_alone(precision):
    gradient, change = one_step(lr=1.0, clip=1e-3, precision=precision)
    assert float(gradient.norm()) > 1e-2
    assert float(change.norm()) == pytest.approx(1e-3, rel=1e-2)
    assert float(torch.cosine_similarity(change, -gradient, dim=0)) == pytest.approx(1.0, abs=1e-3)
    _, change = one_step(lr=1.0, clip=1e3, precision=precision)
    rounding = {"rtol": 1e-4, "atol": 1e-6} if precision == "float32" else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(change, -gradient, **rounding)


def test_penalties_of_the_blocks_are_added_to_the_loss_and_recorded_apart():
    data, settings = blobs(), {"net": "odenet", "stack": Stack(norm="none"), "steps": 2}
    model, plain = net_for(data, kinetic=0.5, **settings), net_for(data, **settings)
    x, labels = data.train.inputs, data.train.labels
    with collect_penalties() as penalties:
        loss = F.cross_entropy(model(x), labels)
    (penalty,) = penalties
    expected = torch.autograd.grad(loss + penalty, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    (record,) = fit(model, data, Recipe(epochs=1, batch_size=64, lr=0.5, **PLAIN))
    for p, held, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach() - held, -0.5 * g, rtol=1e-4, atol=1e-6)
    assert record["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-5)
    assert record["penalty"] > 0
    (without,) = fit(plain, data, Recipe(epochs=1, batch_size=64, lr=0.5, **PLAIN))
    assert record["train_loss"] == without["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert "penalty" not in without


def test_a_penalty_keeps_the_flow_short():
    data, energies = blobs(), []
    for kinetic in (0.0, 10.0):
        model = net_for(data, "odenet", kinetic=kinetic, stack=Stack(norm="none"))
        fit(model, data, Recipe(epochs=20, batch_size=32, lr=0.05))
        (block,) = (module for module in model.modules() if isinstance(module, ODEBlock))
        block.kinetic = 1.0
        with torch.no_grad(), collect_penalties() as penalties:
            model(data.train.inputs)
        energies.append(float(penalties[0]))
    assert energies[1] < 0.2 * energies[0]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_every_step_has_its_learning_rate_in_every_group(schedule):
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    recipe = Recipe(epochs=4, batch_size=16, lr=0.1, schedule=schedule, warmup=1.0)
    try:
        records = fit(net_for(blobs()), blobs(), recipe)
    finally:
        hook.remove()
    expected = [learning_rate(recipe, step, 4) for step in range(16)]
    assert seen == [[lr, lr] for lr in expected]
    assert [record["lr"] for record in records] == expected[3::4]


class Memory(nn.Module):
    """A linear layer that remembers its batches of numbers."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 2), []

    def forward(self, x):
        self.seen.append(x[:, 0].tolist())
        return self.layer(x)


def test_an_epoch_sees_each_sample_once_but_for_a_last_smaller_batch():
    model = Memory()
    fit(model, points(torch.arange(10.0)), Recipe(epochs=3, batch_size=4))
    assert [len(batch) for batch in model.seen] == [4] * 6
    epochs = [model.seen[i] + model.seen[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # A split smaller than a batch is one batch.
    model.seen.clear()
    fit(model, points(torch.arange(3.0)), Recipe(epochs=1, batch_size=4))
    assert [sorted(batch) for batch in model.seen] == [[0, 1, 2]]


def test_a_record_says_what_was_measured(digits):
    model = net_for(digits, "odenet")
    records = fit(model, digits, Recipe(epochs=2, batch_size=64, lr=0.01))
    assert [record["epoch"] for record in records] == [1, 2]
    last = records[-1]
    assert set(last) == {
        "epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "nfe", *TIMINGS
    }  # fmt: skip
    found = evaluate(model, digits.batches("validation", 50))
    assert (last["validation_loss"], last["validation_accuracy"]) == (found.loss, found.accuracy)
    assert last["nfe"] == 3 * 4 + 2
    assert last["images_per_second"] == pytest.approx(3 * 64 / last["seconds"])


def test_without_a_validation_split_none_is_recorded():
    data = points(torch.rand(8, 3), labels=torch.arange(8) % 2)
    (record,) = fit(net_for(data), data, Recipe(epochs=1, batch_size=4))
    assert not any(key.startswith("validation") for key in record)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(digits):
    dtypes = []
    found = {}
    for precision in ("float32", "bfloat16"):
        model = net_for(digits, "odenet")
        convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda module, inputs, out: dtypes.append((module.training, out.dtype)))
        (found[precision],) = fit(model, digits, Recipe(epochs=1, batch_size=100, lr=0.01, precision=precision))
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert set(dtypes) == {(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)}
    assert found["bfloat16"]["train_loss"] != found["float32"]["train_loss"]
    assert found["bfloat16"]["train_loss"] == pytest.approx(found["float32"]["train_loss"], rel=0.05)


# Augmentation


class Black(Augment):
    """An augmentation of which nothing but its having been there remains."""

    def __bool__(self):
        return True

    def __call__(self, images, generator=None, **_):
        self.seen.append(len(images))
        return torch.zeros_like(images)


def test_augmentation_acts_on_the_training_batches_alone(digits):
    augment = Black()
    object.__setattr__(augment, "seen", [])
    inputs = {True: [], False: []}
    model = net_for(digits)
    model.register_forward_pre_hook(lambda module, x: inputs[module.training].append(x[0].clone()))
    (record,) = fit(model, digits, Recipe(epochs=1, batch_size=100, lr=0.01), augment=augment)
    assert augment.seen == [100, 100]
    black = digits.standardize(torch.zeros(100, 1, 8, 8, dtype=torch.uint8))
    assert len(inputs[True]) == 2
    assert all(torch.equal(x, black) for x in inputs[True])
    assert torch.equal(torch.cat(inputs[False]), digits.standardize(digits.validation.inputs))
    assert record["validation_loss"] == evaluate(model, digits.batches("validation", 50)).loss


def test_augmentation_changes_the_images_and_not_the_order(digits):
    seen = {}
    for shift in (0, 1):
        model = net_for(digits)
        batches = seen[shift] = []
        model.register_forward_pre_hook(lambda module, x, batches=batches: batches.append(x[0].clone()))
        data = replace(digits, validation=digits.validation.take(slice(0)))
        fit(model, data, Recipe(epochs=1, batch_size=50), augment=Augment(shift=shift))
    plain, shifted = (torch.cat(seen[shift]) for shift in (0, 1))
    # A shift by nothing, one of nine, shows which image it is.
    same = (plain == shifted).flatten(1).all(1)
    assert 0.03 < float(same.float().mean()) < 0.3


# The seed


def regularized(digits, seed, net="resnet", **settings):
    stack = Stack(dropout=Dropout(p=0.3), augment=Augment(flip=True, shift=1))
    model = net_for(digits, net, stack=stack)
    recipe = Recipe(epochs=2, batch_size=50, lr=0.05, seed=seed, **settings)
    return untimed(fit(model, digits, recipe, augment=stack.augment)), weights(model)


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_a_seed_decides_every_number(digits, net):
    torch.manual_seed(1)
    records, found = regularized(digits, 5, net)
    torch.manual_seed(2)
    again, twin = regularized(digits, 5, net)
    other, stranger = regularized(digits, 6, net)
    assert records == again
    assert equal(found, twin)
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(records, other, strict=True))
    assert not equal(found, stranger)


def test_the_global_random_state_is_left_as_it_was(digits):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    regularized(digits, 5)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TrainingError):
        regularized(digits, 5, schedule="constant", clip=None, weight_decay=1e30)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_and_the_epoch_decide_the_order():
    orders = {}
    for seed in (0, 0, 1):
        model = Memory()
        fit(model, points(torch.arange(20.0)), Recipe(epochs=2, batch_size=20, seed=seed))
        for epoch, batch in enumerate(model.seen):
            assert orders.setdefault((seed, epoch), batch) == batch
    assert len({tuple(order) for order in orders.values()}) == 4


def test_the_seed_and_the_epoch_decide_the_masks():
    # All samples are one, so that their order decides nothing, and nothing is learned.
    data = points(torch.ones(16, 3))
    losses = {}
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Dropout(0.5), net_for(data, stack=Stack(norm="none")))
        for record in fit(model, data, Recipe(epochs=2, batch_size=16, lr=1e-30, seed=seed)):
            assert losses.setdefault((seed, record["epoch"]), record["train_loss"]) == record["train_loss"]
    assert len(set(losses.values())) == 4


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    modes = []
    model = net_for(blobs()).eval()
    model.register_forward_pre_hook(lambda module, _: modes.append(all(part.training for part in module.modules())))
    fit(model, blobs(), Recipe(epochs=2, batch_size=32))
    assert modes == [True, True, False, True, True, False]


# A loss that is not finite


class Breaks(nn.Module):
    """A linear layer whose ``at``-th training step gives ``value``."""

    def __init__(self, at, value):
        super().__init__()
        self.layer, self.at, self.value, self.steps = nn.Linear(3, 2), at, value, 0

    def forward(self, x):
        self.steps += self.training
        return self.layer(x) * (self.value if self.training and self.steps == self.at else 1.0)


@pytest.mark.parametrize(("at", "epoch"), [(1, 1), (4, 1), (5, 2), (11, 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_names_its_step(tmp_path, at, epoch, value):
    with Run.create(tmp_path / "run", {}) as run:
        with pytest.raises(TrainingError, match=rf"the loss became nan at step {at} \(epoch {epoch}\): try"):
            fit(Breaks(at, value), blobs(), Recipe(epochs=4, batch_size=16, lr=0.25), run=run)
        assert len(run.metrics()) == epoch - 1
        checkpoint = run.load_checkpoint()
    # The last whole epoch is what remains.
    if epoch == 1:
        assert checkpoint is None
    else:
        assert checkpoint["epoch"] == epoch - 1
        assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_checkpoint_survives_a_broken_epoch_byte_by_byte(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        fit(Breaks(0, 0.0), blobs(), Recipe(epochs=1, batch_size=16), run=run)
        held = (run.path / "checkpoint.pt").read_bytes()
        with pytest.raises(TrainingError, match=r"a learning rate below 0\.1"):
            fit(Breaks(2, math.nan), blobs(), Recipe(epochs=2, batch_size=16), run=run)
        assert (run.path / "checkpoint.pt").read_bytes() == held
        assert len(run.metrics()) == 1


def test_weights_that_the_last_step_of_an_epoch_blew_up_reach_no_checkpoint(tmp_path):
    far = points(1e30 * torch.rand(8, 3), labels=torch.arange(8) % 2)
    with Run.create(tmp_path / "run", {}) as run:
        with pytest.raises(TrainingError, match=r"a weight became no longer finite at step 1 \(epoch 1\)"):
            fit(nn.Linear(3, 2), far, Recipe(epochs=1, batch_size=8, lr=1e30), run=run)
        assert run.load_checkpoint() is None
        assert run.metrics() == []


# Early stopping


class Drift(nn.Module):
    """Logits (0, x + b): training on label 1 alone drives b up, by nearly lr an epoch."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x + self.b], 1)


def stop_before(last):
    """A callback that is an interrupt from the keyboard before epoch ``last``."""

    def interrupt(model, optimizer, epoch):
        if epoch == last:
            raise KeyboardInterrupt

    return interrupt


def drifting(epochs, patience):
    """A training whose validation accuracy is (0.5, 0.75, 1, 1, 0.75, 0.5, …), as b passes the points."""
    data = points(
        torch.full((8,), -100.0),
        validation=[-1.5, -2.5, -4.5, -5.5],
        labels=torch.ones(8),
        validation_labels=[1, 1, 0, 0],
    )
    model = Drift()
    trace = []
    model.register_forward_hook(lambda module, *_: None if module.training else trace.append(float(module.b)))
    recipe = Recipe(epochs=epochs, batch_size=8, lr=1.0, patience=patience, **PLAIN)
    return data, model, trace, recipe


def test_patience_stops_and_restores_the_first_of_the_best_weights():
    data, model, trace, recipe = drifting(20, 3)
    records = fit(model, data, recipe)
    assert [record["validation_accuracy"] for record in records] == [0.5, 0.75, 1.0, 1.0, 0.75, 0.5]
    assert trace == pytest.approx([1, 2, 3, 4, 5, 6])
    assert model.b.item() == trace[2]
    assert evaluate(model, data.batches("validation", 4)).accuracy == 1.0


def test_patience_forgives_what_recovers_in_time():
    data, model, _, recipe = drifting(20, 4)
    assert len(fit(model, data, recipe)) == 3 + 4
    data, model, _, recipe = drifting(20, 1)
    assert len(fit(model, data, recipe)) == 3 + 1


def test_the_best_weights_are_restored_at_the_end_of_all_epochs_too():
    data, model, trace, recipe = drifting(5, 10)
    assert len(fit(model, data, recipe)) == 5
    assert model.b.item() == trace[2]


def test_what_was_best_before_a_change_of_structure_is_forgotten():
    data, model, trace, recipe = drifting(7, 10)
    fit(model, data, recipe, callbacks=[lambda model, optimizer, epoch: epoch == 4])
    assert model.b.item() == trace[4]


def test_without_patience_the_last_weights_stay():
    data, model, trace, recipe = drifting(5, None)
    fit(model, data, recipe)
    assert model.b.item() == trace[4]


def test_a_training_in_float16_resumes_at_the_scale_it_had_found(tmp_path):
    """Gradients of inputs so large overflow at the first scale, and these steps are left out."""
    data = blobs()
    data = replace(data, train=Split(3000.0 * data.train.inputs, data.train.labels))
    recipe = Recipe(epochs=3, batch_size=16, lr=1e-6, precision="float16")
    whole, resumed = (torch.nn.Linear(3, 2) for _ in range(2))
    resumed.load_state_dict(whole.state_dict())
    begin = weights(whole)
    fit(whole, data, recipe)
    with Run.create(tmp_path / "run", {}) as run:
        with pytest.raises(KeyboardInterrupt):
            fit(resumed, data, recipe, run=run, callbacks=[stop_before(2)])
        assert run.load_checkpoint()["scaler"]["scale"] < 65536.0
        resumed.load_state_dict(begin)
        fit(resumed, data, recipe, run=run)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(whole.weight, begin["weight"])


def test_a_training_that_stopped_early_stays_stopped(tmp_path):
    data, model, trace, recipe = drifting(20, 3)
    with Run.create(tmp_path / "run", {}) as run:
        records = fit(model, data, recipe, run=run)
        assert run.load_checkpoint()["model"]["b"].item() == trace[2]
        _, again, trace, _ = drifting(20, 3)
        assert fit(again, data, recipe, run=run) == records
    assert trace == []
    assert equal(weights(again), weights(model))


def test_the_count_of_bad_epochs_survives_an_interruption(tmp_path):
    data, model, _, recipe = drifting(20, 3)
    expected = fit(model, data, recipe)
    with Run.create(tmp_path / "run", {}) as run:
        for epochs in (4, 5):
            _, again, _, _ = drifting(20, 3)
            interrupt_at(again, epochs - len(run.metrics()) + 1)
            with pytest.raises(KeyboardInterrupt):
                fit(again, data, recipe, run=run)
            assert len(run.metrics()) == epochs
        _, again, _, _ = drifting(20, 3)
        records = fit(again, data, recipe, run=run)
    assert untimed(records) == untimed(expected)
    assert equal(weights(again), weights(model))


# Refusals


def test_patience_needs_a_validation_split():
    data = points(torch.rand(8, 3), labels=torch.arange(8) % 2)
    with pytest.raises(InvalidInput, match="patience needs a validation split"):
        fit(net_for(data), data, Recipe(patience=2))


def test_one_sample_is_too_few():
    data = points(torch.rand(1, 3))
    with pytest.raises(InvalidInput, match="has 1 samples: at least 2"):
        fit(net_for(data), data, Recipe())


def test_batch_norm_needs_more_than_one_sample_in_a_batch():
    data, recipe = blobs(4, 4), Recipe(epochs=1, batch_size=1)
    for model in (nn.Sequential(nn.Linear(3, 2), BatchNorm(2)), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))):
        with pytest.raises(InvalidInput, match="batch norm averages over a batch, and batch_size is 1"):
            fit(model, data, recipe)
    (record,) = fit(net_for(data, stack=Stack(norm="layer")), data, recipe)
    assert math.isfinite(record["train_loss"])


# Runs


@pytest.mark.parametrize("net", ["resnet", "odenet"])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path, digits, net, at):
    stack = Stack(dropout=Dropout(p=0.3), augment=Augment(flip=True, shift=1))
    recipe = Recipe(epochs=2, batch_size=50, lr=0.05)

    def train(run=None, at=None):
        model = net_for(digits, net, stack=stack)
        interrupt_at(model, at)
        return fit(model, digits, recipe, augment=stack.augment, run=run), weights(model)

    expected, held = train()
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Run.create(folder, {}) as run:
        train(run, at)
    assert len(Run.open(folder).metrics()) == (at - 1) // 4
    with Run.create(folder, {}) as run:
        records, found = train(run)
        assert run.metrics() == records
    assert untimed(records) == untimed(expected)
    assert equal(found, held)


def test_a_record_after_the_checkpoint_is_computed_again(tmp_path, digits):
    recipe = Recipe(epochs=2, batch_size=100, lr=0.05)
    with Run.create(tmp_path / "run", {}) as run:
        fit(net_for(digits), digits, replace(recipe, epochs=1, schedule="constant"), run=run)
        held = (run.path / "checkpoint.pt").read_bytes()
        first = run.metrics()
        run.log({"epoch": 2, "train_loss": -1.0})
        records = fit(net_for(digits), digits, replace(recipe, schedule="constant"), run=run)
        assert (run.path / "checkpoint.pt").read_bytes() != held
        assert records[:1] == first
        assert [record["epoch"] for record in run.metrics()] == [1, 2]
        assert run.metrics()[1]["train_loss"] > 0


def test_a_checkpoint_of_another_net_is_an_error(tmp_path, digits):
    with Run.create(tmp_path / "run", {}) as run:
        fit(net_for(digits), digits, Recipe(epochs=1, batch_size=100), run=run)
        held = everything_in(run.path)
        with pytest.raises(RunError, match="does not fit the net of its config"):
            fit(net_for(digits, depth=14), digits, Recipe(epochs=1, batch_size=100), run=run)
        assert everything_in(run.path) == held


def test_what_is_logged_is_what_is_returned(tmp_path, digits):
    with Run.create(tmp_path / "run", {}) as run:
        records = fit(net_for(digits), digits, Recipe(epochs=2, batch_size=100), run=run)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_progress_off_a_terminal_is_a_line_an_epoch(digits, capsys):
    fit(net_for(digits), digits, Recipe(epochs=2, batch_size=100, lr=0.01), progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch   1/2", "epoch   2/2"]
    assert all(word in lines[0] for word in ("loss", "accuracy", "validation", "NFE 3", "images/s"))
    fit(net_for(digits), digits, Recipe(epochs=1, batch_size=100, lr=0.01))
    said = capsys.readouterr()
    assert said.out == said.err == ""
