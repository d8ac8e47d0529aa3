"""The certificate tells flows from nets that have fitted their grid; and it leaves the net alone."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torchvision
from linear_flows import D, data, net_of
from torch import nn

from resode import InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack, build, dynamics, recalibrate
from resode.limits import Certificate, certificate
from resode.limits.distance import distance
from resode.limits.identity_bias import identity_bias
from resode.limits.lyapunov import lyapunov
from resode.limits.reconstruction import reconstruction
from resode.limits.regularity import regularity
from resode.limits.signal import signal
from resode.limits.swap import swap
from resode.limits.verdict import verdict
from resode.report import png
from resode.runs.values import dump, jsonable

C = 8


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(C, C, dtype=torch.float64, generator=generator) / math.sqrt(C) for _ in range(3)]


class Smooth(nn.Module):
    """f(t, h) = tanh(W(t) h) with W(t) = A + B cos 2t, an honest field."""

    def __init__(self, seed, size=0.5):
        super().__init__()
        for name, W in zip("AB", weights(seed), strict=False):
            self.register_buffer(name, size * W)

    def forward(self, t, h):
        return torch.tanh(h @ (self.A + self.B * math.cos(2 * t)).T)


class OnItsGrid(Smooth):
    """An analytic field that is one thing at the points that a grid of ``steps`` evaluates, and its opposite between.

    f(t, h)·(1 + 3 cos ωt): with ω = 2π·steps for Euler's method, 4π·steps for rk4 (whose stages stand at midpoints,
    too) every evaluation sees 4 f, and the flow is that of f on the mean: cos averages out.
    """

    def __init__(self, seed, steps, solver):
        super().__init__(seed)
        self.frequency = {"euler": 2 * math.pi, "rk4": 4 * math.pi}[solver] * steps

    def forward(self, t, h):
        return super().forward(t, h) * (1 + 3 * math.cos(self.frequency * t))


def headed(block, seed):
    head = nn.Linear(C, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, C, dtype=torch.float64, generator=generator))
        head.bias.zero_()
    return nn.Sequential(*block, head)


def labelled(net, seed, count=96):
    """Data on which ``net`` is right, as it is used, and sure of it: those of a task that it has learned."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(4 * count, C, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        logits = net(x)
    top = logits.topk(2).values
    sure = ((top[:, 0] - top[:, 1]) / logits.norm(dim=1)).argsort(descending=True)[:count]
    return [(x[sure], logits[sure].argmax(1))]


def parts(net, batches):
    return swap(net, batches), distance(net, batches, samples=16), reconstruction(net, batches, samples=16)


# An Euler step of 1/N of this field errs by some ½/N: it takes 8 to come within a tenth.
CASES = [("rk4", steps) for steps in (2, 4, 8, 16)] + [("euler", steps) for steps in (8, 16, 32, 64)]


@pytest.mark.parametrize(("solver", "steps"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_flow_passes_and_a_net_that_fitted_its_grid_fails(solver, steps, seed):
    net = headed([ODEBlock(Smooth(seed), solver, steps)], seed)
    found = verdict(*parts(net, labelled(net, seed)))
    assert found.near_ode is True, found.words
    assert {check.name: check.passed for check in found.checks} == dict.fromkeys(
        ("refinement", "accuracy", "order", "trajectory", "reconstruction"), True
    )
    net = headed([ODEBlock(OnItsGrid(seed, steps, solver), solver, steps)], seed)
    found = verdict(*parts(net, labelled(net, seed)))
    assert found.near_ode is False
    assert {"refinement", "trajectory"} <= {check.name for check in found.checks if check.passed is False}
    assert found.words.startswith(f"Not near an ODE at {steps} steps of {solver}: ")


class Layer(nn.Module):
    """f(h) = tanh(W h)."""

    def __init__(self, W):
        super().__init__()
        self.linear = nn.Linear(C, C, bias=False, dtype=torch.float64)
        self.linear.weight = nn.Parameter(W)

    def forward(self, t, h):
        return torch.tanh(self.linear(h))


@pytest.mark.parametrize("depth", [8, 16, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_a_residual_net_passes_if_its_weights_are_smooth_and_fails_if_they_are_independent(depth, seed):
    A, B, _ = weights(seed)
    smooth = [0.5 * (A + B * math.cos(2 * i / depth)) for i in range(depth)]
    net = headed([ResidualBlock(Layer(W), scale=1 / depth, t=i / depth) for i, W in enumerate(smooth)], seed)
    swapped, *others = parts(net, labelled(net, seed))
    found = verdict(swapped, *others)
    assert found.near_ode is True, found.words
    assert swapped.observed_order == pytest.approx(1.0, abs=0.2)
    generator = torch.Generator().manual_seed(seed)
    draws = 2 * torch.randn(depth, C, C, dtype=torch.float64, generator=generator) / math.sqrt(C)
    net = headed([ResidualBlock(Layer(W), scale=depth**-0.5, t=i / depth) for i, W in enumerate(draws)], seed)
    found = verdict(*parts(net, labelled(net, seed)))
    assert found.near_ode is False, found.words


# Single checks


def passed(found, name):
    return next(check.passed for check in found.checks if check.name == name)


def test_too_few_samples_to_tell_a_loss_of_accuracy():
    """2 of 20 samples lost: 10%, give or take 13%."""
    swapped, away, back = parts(net_of("rk4", 16), data())
    lost = replace(swapped.reference, lost=0.10, lost_margin=0.13)
    found = verdict(replace(swapped, reference=lost), away, back)
    assert (found.near_ode, passed(found, "accuracy")) == (None, None)
    assert "too few to tell" in found.words
    surely = replace(swapped.reference, lost=0.10, lost_margin=0.05)
    assert verdict(replace(swapped, reference=surely), away, back).near_ode is False
    gained = replace(swapped.reference, lost=-0.10, lost_margin=0.05)
    assert verdict(replace(swapped, reference=gained), away, back).near_ode is True


@pytest.mark.parametrize(
    ("error", "twice", "order", "expected"),
    [
        (0.009, 0.009, 4, True),  # resolved
        (0.05, 0.05 / 2, 1, True),
        (0.05, 0.05 / 1.3, 1, False),  # order 0.38
        (0.05, 0.05 / 5, 1, False),  # order 2.3: faster than Euler's method can
        (0.05, 0.05 / 2.1, 4, True),  # kinks: order 1.07
        (0.05, 0.05 / 1.8, 4, False),
        (0.05, 0.05 / 31, 4, True),
        (0.05, 0.05 / 33, 4, False),
        (0.05, 0.06, 1, False),
        (0.05, 0.0, 1, False),
    ],
)
def test_the_error_must_be_next_to_none_or_fall_at_the_solvers_order(error, twice, order, expected):
    swapped, away, back = parts(net_of("rk4", 16), data())
    evaluations = tuple(
        replace(e, error={1.0: error, 2.0: twice}.get(e.factor, e.error)) if e.solver == "as trained" else e
        for e in swapped.evaluations
    )
    found = verdict(replace(swapped, evaluations=evaluations, order=order), away, back)
    assert passed(found, "order") is expected
    assert found.near_ode is expected


@pytest.mark.parametrize(
    ("errors", "rounding", "expected"),
    [
        ((0.009, 0.5, 0.5), 0.0, True),
        ((0.5, 0.2, 0.1), 1e-9, True),
        ((3.0, 2.9, 1.2), 1e-9, True),  # it falls once the grid is fine
        ((0.5, 0.45, 0.4), 1e-9, False),
        ((0.5, 0.45, 0.4), 0.05, None),  # rounding may be an eighth of it
        ((math.inf, math.inf, math.inf), 0.0, None),
        ((0.5, math.nan, math.nan), 0.0, None),
    ],
)
def test_what_comes_back_must_be_near_or_come_nearer_or_cannot_be_told(errors, rounding, expected):
    swapped, away, back = parts(net_of("rk4", 16), data())
    (block,) = back.blocks
    blocks = (replace(block, errors=errors, rounding=rounding, order=1), replace(block, errors=(1e-3, 1e-4, 1e-5)))
    found = verdict(swapped, away, replace(back, blocks=blocks))
    assert passed(found, "reconstruction") is expected
    assert found.near_ode is (expected is not False)
    if expected is None:
        assert "ill-conditioned" in found.words


def test_logits_that_rounding_changes_cannot_be_told():
    swapped, away, back = parts(net_of("rk4", 16), data())
    found = verdict(replace(swapped, rounding=0.02), away, back)
    assert (found.near_ode, passed(found, "refinement")) == (None, None)
    assert "rounding" in found.words


def test_a_net_far_from_its_flow_or_without_numbers_is_not_near():
    swapped, away, back = parts(net_of("rk4", 16), data())
    (block,) = away.blocks
    for far in (0.2, math.nan, math.inf):
        off = replace(away, blocks=(replace(block, relative=(0.0, far, 0.0)),))
        assert passed(verdict(swapped, off, back), "trajectory") is False
        reference = replace(swapped.reference, change=far)
        found = verdict(replace(swapped, reference=reference), away, back)
        assert passed(found, "refinement") is False
        assert "the reference solve changes the logits" in found.words


class Blast(nn.Module):
    """dh/dt = 10 h³: two steps of Euler's method know nothing of its end in finite time."""

    def forward(self, t, h):
        return 10 * h**3


def test_a_flow_that_ends_before_the_net_does_is_none():
    net = headed([ODEBlock(Blast(), "euler", 2)], 0)
    batches = [(torch.ones(4, C, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))]
    found = certificate(net, batches)
    assert found.verdict.near_ode is False
    assert not math.isfinite(found.swap.reference.change)
    again = Certificate.from_dict(json.loads(dump(jsonable(found.to_dict()))))
    assert again.verdict.near_ode is False
    assert math.isnan(again.swap.reference.change), "JSON has no infinity"
    assert verdict(again.swap, again.distance, again.reconstruction).near_ode is False
    assert png(again.plot()) == png(found.plot())
    net[0].steps = 64
    with pytest.raises(InvalidInput, match="infinite or no numbers"):
        certificate(net, batches)


# The whole


def test_its_parts_are_those_of_the_analyses():
    net, batches = net_of("rk4", 4), data()
    found = certificate(net, batches)
    view = dynamics(net, batches[0][0])
    assert found.swap == swap(net, batches)
    assert found.reconstruction == reconstruction(net, batches)
    assert found.distance == distance(net, batches)
    assert found.regularity == regularity(view, batches)
    assert found.bias == identity_bias(view, batches)
    assert found.signal == signal(view, batches)
    assert found.lyapunov == lyapunov(view, batches)
    assert found.verdict == verdict(found.swap, found.distance, found.reconstruction)
    assert (found.count, found.lifted, found.missing, found.initial_bias) == (7, False, (), None)


def image_net(**settings):
    config = NetConfig(width=4, channels=1, size=(8, 8), classes=3, stack=Stack(norm="batch"), **settings)
    return build(config, seed=0)


def image_data(count=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator))]


@pytest.mark.parametrize(
    "settings",
    [
        {"net": "odenet", "kind": "preact", "solver": "euler", "steps": (2, 1, 3)},
        {"net": "odenet", "kind": "preact", "solver": "bosh3", "rtol": 0.03, "atol": 0.03, "extra_channels": 1},
        {"net": "odenet", "kind": "preact", "steps": 1, "gradient": "reversible", "time": "linear"},
        {"net": "odenet", "kind": "preact", "solver": "explicit_adams", "steps": 2},
        {"net": "resnet", "depth": 14, "kind": "preact", "scale": "skipinit"},
        {"net": "resnet", "depth": 14},
    ],
)
def test_nets_of_ours_are_looked_at_and_left_alone(settings):
    net = image_net(**settings).train()
    net(image_data()[0][0])
    held = {key: value.clone() for key, value in net.state_dict().items()}
    blocks = [module for module in net.modules() if isinstance(module, ODEBlock)]
    before = [(b.solver, b.steps, b.rtol, b.gradient, b.compile_mode) for b in blocks]
    found = certificate(net, image_data(), initial=image_net(**settings), directions=2)
    assert found.lifted is (settings["net"] == "resnet")
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
    assert [(b.solver, b.steps, b.rtol, b.gradient, b.compile_mode) for b in blocks] == before
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert found.initial_bias is not None
    assert Certificate.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert certificate(net.eval(), image_data(), initial=image_net(**settings), directions=2) == found


def test_projected_dynamics_have_no_way_back():
    found = certificate(image_net(net="resnet", depth=14), image_data())
    assert found.reconstruction is None
    assert dict(found.missing).keys() == {"reconstruction"}
    assert "no inverse" in dict(found.missing)["reconstruction"]
    assert found.swap.reference.solver == "as trained"
    assert passed(found.verdict, "reconstruction") is None


def test_a_foreign_net_has_its_parts_and_no_verdict():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(4, 3, 32, 32)
    found = certificate(net, [(x, torch.zeros(4, dtype=torch.int64))], directions=1)
    assert found.verdict.near_ode is None
    assert "cannot be lifted" in found.verdict.words
    assert found.swap is found.distance is found.reconstruction is None
    assert set(dict(found.missing)) == {"swap", "distance", "reconstruction"}
    assert len(found.bias.steps) == 8


def test_the_initial_net_is_recalibrated_in_a_copy():
    net, first = image_net(net="resnet", depth=14), image_net(net="resnet", depth=14)
    held = {key: value.clone() for key, value in first.state_dict().items()}
    found = certificate(net, image_data(), initial=first)
    assert all(torch.equal(value, held[key]) for key, value in first.state_dict().items())
    recalibrate(first, image_data())
    assert found.initial_bias == identity_bias(dynamics(first), image_data())
    assert found.initial_bias != found.bias


def test_another_type_is_looked_at_in_a_copy():
    net = image_net(net="odenet", kind="preact", steps=2)
    found = certificate(net, image_data(), dtype=torch.float64)
    assert next(net.parameters()).dtype == torch.float32
    assert found.swap.rounding < 1e-13
    single = certificate(net, image_data())
    assert single.swap.rounding > 1e-9
    assert single.swap.own(1.0).error == pytest.approx(found.swap.own(1.0).error, rel=0.05)


def test_data_are_gone_through_once_and_no_further_than_needed():
    def batches():
        yield from image_data(8)
        yield from image_data(8)
        pytest.fail("no more was needed")

    found = certificate(image_net(net="resnet", depth=14), batches(), samples=10, few=4)
    assert (found.count, found.swap.count, found.distance.count, found.lyapunov.count) == (10, 10, 4, 1)


def test_what_makes_no_sense_is_refused():
    net = image_net(net="resnet", depth=14)
    for name in ("samples", "few", "directions"):
        with pytest.raises(InvalidInput, match=f"{name} is 0"):
            certificate(net, iter([pytest.fail]), **{name: 0})
    with pytest.raises(InvalidInput, match="no data"):
        certificate(net, [])
    with pytest.raises(InvalidInput, match="no step of the network is residual"):
        certificate(image_net(net="plain", depth=8), image_data())


@pytest.mark.parametrize("what", ["logits", "inputs"])
def test_zeros_are_no_distance_from_zeros(what):
    net, batches = net_of("rk4", 4), data()
    for p in net[1].parameters():
        if what == "logits" or p.ndim == 1:
            nn.init.zeros_(p)
    if what == "inputs":
        batches = [(0.0 * x, labels) for x, labels in batches]
    found = certificate(net, batches)
    assert {e.change for e in found.swap.evaluations} == {found.swap.sensitivity} == {0.0}
    assert found.verdict.near_ode is True
    if what == "inputs":
        assert set(found.distance.blocks[0].relative) == {0.0}
        assert found.reconstruction.blocks[0].errors == (0.0, 0.0, 0.0)


def test_a_linear_flow_of_no_motion_is_the_identity_in_every_part():
    net = net_of("euler", 4, torch.zeros(D, D, dtype=torch.float64))
    found = certificate(net, data())
    assert found.verdict.near_ode is True
    assert found.swap.own(2.0).change == found.reconstruction.blocks[0].errors[0] == found.distance.worst == 0.0
    assert found.distance.blocks[0].lipschitz == 0.0
    assert {step.ratio for step in found.bias.steps} == {0.0}
    assert {step.branch for step in found.signal.steps} == {0.0}
    assert found.lyapunov.stretches[0].exponents == pytest.approx([0.0] * D, abs=1e-12)
    assert found.regularity.stretches[0].straightness is None
