"""The recipe: what is refused, the learning rate in closed form, the optimizer it makes."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from resode import InvalidInput, Recipe
from resode.train.averaging import Average
from resode.train.dropout_epochs import DropoutEpochs
from resode.train.penalties import Penalties
from resode.train.recipe import learning_rate, make_optimizer

# Refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'.*sgd, sgdw, adam, adamw"),
        ({"schedule": "square"}, "unknown schedule 'square'.*cosine, linear, step, constant, one-cycle"),
        ({"precision": "float8"}, "unknown precision 'float8'.*float32, bfloat16, float16"),
        ({"loss": "bce", "target_threshold": 1.0}, r"target_threshold is 1.0: a number in \[0, 1\)"),
        ({"target_threshold": 0.2}, "target_threshold is 0.2, and the loss is cross-entropy.*use loss bce"),
        ({"loss": "hinge"}, "unknown loss 'hinge'.*cross-entropy, bce"),
        ({"final": 1.5}, "final is 1.5"),
        ({"adaptive_clip": 0.0}, "adaptive_clip is 0.0"),
        ({"freeze_norm": 2.5}, "freeze_norm is 2.5: a whole number"),
        ({"epochs": 3, "freeze_norm": 3}, "freeze_norm after epoch 3 of 3: nothing would be trained after it"),
        ({"freeze_norm": 3, "recalibrate": True}, "freeze_norm has trained the net for those that it froze"),
        ({"epochs": 3, "dropping": DropoutEpochs(phase="early", epochs=4)}, "dropout is early with 4 epochs"),
        ({"epochs": 3, "dropping": DropoutEpochs(phase="late", epochs=3)}, "dropout is late, after 3 epochs, .* never"),
        *(({name: 0}, f"{name} is 0") for name in ("epochs", "batch_size", "lr", "gamma", "clip", "patience")),
        *(({name: -1}, f"{name} is -1") for name in ("epochs", "batch_size", "lr", "gamma", "clip", "patience")),
        *(({name: math.nan}, f"{name} is nan") for name in ("lr", "gamma", "clip", "momentum", "weight_decay")),
        *(({name: math.inf}, f"{name} is inf") for name in ("lr", "clip", "warmup", "weight_decay")),
        *(({name: 1.5}, f"{name} is 1.5: a whole number") for name in ("epochs", "batch_size", "patience")),
        *(({name: value}, f"{name} is") for name in ("momentum", "label_smoothing") for value in (-0.1, 1.0)),
        *(({name: -1e-9}, f"{name} is -1e-09") for name in ("weight_decay", "warmup")),
        ({"epochs": 3, "warmup": 3.5}, "warmup is 3.5 of 3 epochs"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov is a form of sgd's momentum"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov is a form of sgd's momentum"),
        ({"factorize": True, "optimizer": "adamw"}, "the optimizer is adamw with weight_decay 0.0001: use sgd or adam"),
        ({"factorize": True, "weight_decay": 0.0}, "the optimizer is sgd with weight_decay 0: .* a decay above 0"),
        *(
            ({"factorize": True, **more}, "factorize trains factors")
            for more in ({"average": Average(kind="ema")}, {"refine": (1,)}, {"active_steps": 2})
        ),
        ({"milestones": (0.5, 1.0)}, r"milestones are \(0.5, 1.0\)"),
        ({"milestones": (0.0,)}, r"milestones are \(0.0,\)"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Recipe(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "label_smoothing": 0.0},
        {"epochs": 3, "warmup": 3.0, "freeze_norm": 2, "dropping": DropoutEpochs(phase="late", epochs=2)},
        {"epochs": 3, "dropping": DropoutEpochs(phase="early", epochs=3)},
        {"milestones": ()},
        {"nesterov": True},
        {"clip": 1e-3, "patience": 1, "epochs": 1, "batch_size": 1},
    ],
)
def test_the_ends_of_the_ranges_are_taken(settings):
    recipe = Recipe(**settings)
    assert all(getattr(recipe, name) == value for name, value in settings.items())


def test_a_recipe_survives_json_and_cannot_be_changed():
    recipe = Recipe(
        milestones=(0.3, 0.6),
        clip=1.0,
        patience=3,
        penalty=Penalties(l1=0.1),
        dropping=DropoutEpochs(phase="late", epochs=2),
        average=Average(kind="ema"),
    )
    values = json.loads(json.dumps(asdict(recipe)))
    assert Recipe.from_dict(values) == recipe
    with pytest.raises(FrozenInstanceError):
        recipe.lr = 1.0
    old = {name: value for name, value in values.items() if name not in ("average", "loss")}
    assert Recipe.from_dict(old) == replace(recipe, average=Average())
    with pytest.raises(InvalidInput, match="unknown settings of a recipe: colour"):
        Recipe.from_dict({**values, "colour": 1})


# The learning rate

WHOLE = st.integers(1, 12)


def rates(recipe, steps):
    return [learning_rate(recipe, step, steps) for step in range(recipe.epochs * steps)]


@given(WHOLE, WHOLE, st.floats(0.0, 1.0), st.sampled_from(("cosine", "step", "constant")))
@hypothesis_settings(deadline=None)
def test_the_warm_up_is_a_line_from_lr_over_w_to_lr(epochs, steps, share, schedule):
    recipe = Recipe(epochs=epochs, lr=0.3, warmup=share * epochs, schedule=schedule)
    w = round(share * epochs * steps)
    assert rates(recipe, steps)[:w] == pytest.approx([0.3 * (i + 1) / w for i in range(w)])
    assert w == 0 or rates(recipe, steps)[w - 1] == 0.3
    assert all(0 < lr <= 0.3 for lr in rates(recipe, steps))


@given(WHOLE, WHOLE, st.integers(0, 11))
@hypothesis_settings(deadline=None)
def test_cosine_falls_from_lr_to_nearly_0_after_the_warm_up(epochs, steps, warmup):
    warmup = min(warmup, epochs)
    found = rates(Recipe(epochs=epochs, lr=0.2, warmup=float(warmup)), steps)[warmup * steps :]
    n = len(found)
    assert found == pytest.approx([0.1 * (1 + math.cos(math.pi * i / n)) for i in range(n)])
    if n:
        assert found[0] == 0.2
        assert found == sorted(found, reverse=True)
        # 1 + cos(π − x) ≤ x²/2, with x = π/n at the last step.
        assert 0 < found[-1] <= 0.2 * (math.pi / n) ** 2 / 4 + 1e-12


def test_cosine_has_half_of_lr_halfway():
    assert learning_rate(Recipe(epochs=10, lr=0.4), 50, 10) == pytest.approx(0.2)


@given(WHOLE, st.integers(1, 40), st.lists(st.integers(1, 99), max_size=4))
@example(25, 1, [28])  # 0.28 · 25 is above 7 in floating point
@hypothesis_settings(deadline=None, max_examples=200)
def test_the_step_schedule_falls_at_its_milestones_exactly(epochs, steps, percents):
    recipe = Recipe(epochs=epochs, lr=1.0, schedule="step", gamma=0.5, milestones=tuple(p / 100 for p in percents))
    total = epochs * steps
    for step, lr in enumerate(rates(recipe, steps)):
        assert lr == 0.5 ** sum(Fraction(step, total) >= Fraction(p, 100) for p in percents)


def test_the_step_schedule_of_the_paper():
    # He et al. 2016: 0.1, divided by 10 at 32k and 48k of 64k steps.
    recipe = Recipe(epochs=64, schedule="step")
    found = rates(recipe, 10)
    assert found == pytest.approx([0.1] * 320 + [0.01] * 160 + [0.001] * 160)


def test_the_constant_schedule_is_constant():
    assert set(rates(Recipe(epochs=4, lr=0.3, schedule="constant"), 5)) == {0.3}


def test_a_schedule_does_not_depend_on_the_other_schedules_settings():
    for schedule in ("cosine", "constant"):
        one = Recipe(schedule=schedule, epochs=3)
        two = Recipe(schedule=schedule, epochs=3, milestones=(0.1,), gamma=0.9)
        assert rates(one, 4) == rates(two, 4)


def rates_of_torch(scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_the_schedules_are_those_of_torch():
    schedulers = torch.optim.lr_scheduler

    def optimizer():
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)

    cycle = schedulers.OneCycleLR(optimizer(), 0.4, total_steps=40, pct_start=0.25, cycle_momentum=False)
    one_cycle = rates(Recipe(epochs=4, lr=0.4, warmup=1.0, schedule="one-cycle"), 10)
    assert one_cycle == pytest.approx([*rates_of_torch(cycle, 39), 0.4 / 250_000])
    line = schedulers.LinearLR(optimizer(), 1.0, 0.25, total_iters=40)
    assert rates(Recipe(epochs=4, lr=0.4, schedule="linear", final=0.25), 10) == pytest.approx(rates_of_torch(line, 40))
    cosine = schedulers.CosineAnnealingLR(optimizer(), 40, eta_min=0.1)
    found = rates(Recipe(epochs=4, lr=0.4, schedule="cosine", final=0.25), 10)
    assert found == pytest.approx(rates_of_torch(cosine, 40))
    stairs = schedulers.MultiStepLR(optimizer(), [20, 30], gamma=0.1)
    assert rates(Recipe(epochs=4, lr=0.4, schedule="step"), 10) == pytest.approx(rates_of_torch(stairs, 40))


# The optimizer


def test_sgd_has_the_settings_of_the_recipe():
    optimizer = make_optimizer(Recipe(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.02), nn.Linear(3, 2))
    assert type(optimizer) is torch.optim.SGD
    for group, decay in zip(optimizer.param_groups, (0.02, 0.0), strict=True):
        held = (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"])
        assert held == (0.3, 0.8, True, decay)


def test_adamw_decays_weights_apart_from_the_gradient():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(Recipe(optimizer="adamw", lr=0.1, weight_decay=0.5), model)
    assert type(optimizer) is torch.optim.AdamW
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)
