"""Exact path spectra against autograd's gradient, and against every path by itself."""

import itertools
import json
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from jacobians import dense, sums_over_paths, ways
from torch import nn

from resode import (
    Branch,
    Dropout,
    InvalidInput,
    NetConfig,
    ResidualBlock,
    ResidualDynamics,
    Stack,
    Step,
    build,
    dynamics,
)
from resode.paths import delete, lengths, scale, spectrum

NETS = {
    "basic": {"net": "resnet", "depth": 14},
    "preact": {"net": "resnet", "depth": 14, "kind": "preact", "shortcut": "projection", "scale": "1/L"},
    "bottleneck": {"net": "resnet", "depth": 14, "kind": "bottleneck"},
    "tied": {"net": "resnet", "depth": 20, "kind": "preact", "tied": True, "time": "concat"},
    "points": {"net": "resnet", "depth": 8, "kind": "mlp", "size": None, "stack": Stack(norm="group")},
    "plain": {"net": "plain", "depth": 14},
    "vgg": {"net": "vgg", "blocks": 2, "convs": (2, 1), "channels": 2},
    "lenet5": {"net": "lenet5", "size": (12, 12)},
    "euler": {"net": "odenet", "solver": "euler", "steps": (2, 3, 1), "time": "concat"},
    "midpoint": {"net": "odenet", "solver": "midpoint", "steps": (2, 3, 1), "extra_channels": 2},
    "rk4": {"net": "odenet", "solver": "rk4", "steps": (2, 1, 1), "time": "film", "stack": Stack(norm="group")},
    "dopri5": {"net": "odenet", "solver": "dopri5", "steps": (1, 2, 1), "time": "linear"},
}
"""Of every family."""
GRADES = ("step", "evaluation")


def net_of(name, dtype=torch.float64, **settings):
    """A small net whose batch norms have seen data, in training mode."""
    config = NetConfig(**{"width": 4, "channels": 2, "size": (8, 8), "classes": 3, **NETS[name], **settings})
    net = build(config, seed=0).to(dtype)
    with torch.no_grad():
        for _ in range(3):
            net(batch(name, 16, dtype))
    return net


def batch(name, count=4, dtype=torch.float64):
    size = NETS[name].get("size", (8, 8)) or ()
    return torch.randn(count, 2, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def cross_entropy(z):
    """Summed over the samples, with labels 0, 1, 2, 0, …."""
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1], reduction="sum")


def gradient_of(model, x, loss=cross_entropy):
    """By autograd alone."""
    modes = [module.training for module in model.modules()]
    model.eval()
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(model(x)), x)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return found


def sizes(found):
    """Σ_k ‖part_k‖: what rounding is relative to, since parts cancel."""
    return sum(part.norm() for part in found.parts)


def by_hand(count=4, width=3, seed=0, **options):
    """A view of ``count`` residual steps on (B, width), and their matrices."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(width, width, dtype=torch.float64, generator=generator) for _ in range(count)]
    steps = [
        Step(kind="residual", branch=lambda t, h, W=W: (h @ W).tanh(), label=str(i), **options)
        for i, W in enumerate(matrices)
    ]
    return ResidualDynamics(lambda x: 2.0 * x, steps, lambda h: h.sin()), matrices


X = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def square(z):
    return z.square().sum()


# The parts sum to the gradient


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", NETS)
def test_the_parts_sum_to_the_gradient(name, grade):
    net, x = net_of(name), batch(name)
    view = dynamics(net, x)
    found = spectrum.gradient(view, x, cross_entropy, grade=grade)
    expected = gradient_of(net, x)
    assert found.rest is None
    assert found.parts.shape == (len(lengths.counts(view, grade)), *x.shape)
    assert (found.parts.sum(0) - expected).norm() <= 1e-13 * sizes(found)
    assert torch.equal(found.total, found.parts.sum(0))
    # The test can tell: no part that has a path is nothing.
    assert all(part.norm() > 0.0 for part, count in zip(found.parts, found.counts, strict=True) if count)
    assert float(found.shares.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["basic", "tied", "points", "vgg", "midpoint"])
def test_in_single_precision_the_parts_sum_to_the_gradient_in_single_precision(name):
    net, x = net_of(name, torch.float32), batch(name, dtype=torch.float32)
    found = spectrum.gradient(dynamics(net), x, cross_entropy, grade="evaluation")
    assert found.parts.dtype == torch.float32
    assert (found.total - gradient_of(net, x)).norm() <= 1e-5 * sizes(found)


def test_a_view_by_hand_needs_no_model():
    view, _ = by_hand()
    found = spectrum.gradient(view, X, square)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(square(view(x)), x)
    torch.testing.assert_close(found.total, expected, rtol=1e-13, atol=1e-13)


# The parts are the sums over paths


def states(view, x):
    with torch.no_grad():
        return [h.detach() for h in view.states(x)]


def naive_parts(view, x, loss, through_the_stem=True):
    """{length: part} by dense Jacobians, each path by itself."""
    before = states(view, x)
    paths = [ways(step, h) for step, h in zip(view.steps, before, strict=False)]
    if through_the_stem:
        paths = [[(0, dense(view.stem, x))], *paths]
    with torch.enable_grad():
        last = before[-1].requires_grad_()
        (v,) = torch.autograd.grad(loss(view.head(last)), last)
    return sums_over_paths(paths, v.flatten())


def assert_equal_parts(found, expected, tolerance=1e-13):
    whole = sum(part.norm() for part in expected.values())
    for k, part in enumerate(found.parts):
        assert (part.flatten() - expected.get(k, torch.zeros(part.numel()))).norm() <= tolerance * whole
    assert max(expected) == len(found.parts) - 1


def small_net(name, **settings):
    """A net whose Jacobians are small enough to be made, with at most 8 choices of a path."""
    size = {} if NETS[name].get("size", 0) is None else {"width": 2, "size": (4, 4)}
    net = net_of(name, **size, **settings)
    return net, torch.randn(2, 2, *size.get("size", ()), dtype=torch.float64)


SMALL = [
    ("basic", {}),
    ("basic", {"shortcut": "projection", "stack": Stack(norm="group", activation="gelu")}),
    ("preact", {}),
    ("tied", {}),
    ("points", {}),
    ("plain", {}),
    ("euler", {}),
    ("midpoint", {}),
    ("rk4", {}),
]


@pytest.mark.parametrize(("name", "settings"), SMALL)
def test_the_parts_are_the_sums_over_all_paths(name, settings):
    net, x = small_net(name, **settings)
    view = dynamics(net)
    with view.evaluation():
        expected = naive_parts(view, x, cross_entropy)
    found = spectrum.gradient(view, x, cross_entropy)
    assert_equal_parts(found, expected)
    assert found.counts == tuple(paths_of(view).get(k, 0) for k in range(len(found.parts)))


def paths_of(view):
    """{length: number of paths}, one by one."""
    found = {}
    for path in itertools.product(*[(0, 1) if s.has_choice else (int(s.is_counted),) for s in view.steps]):
        found[sum(path)] = found.get(sum(path), 0) + 1
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("scaled", [1.0, -0.3, torch.tensor(0.7, dtype=torch.float64)])
def test_a_view_by_hand_with_every_part_of_a_step(count, scaled):
    turn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    view, _ = by_hand(count, scale=scaled, shortcut=lambda h: h @ turn, post=lambda h: h.sin() + h)
    assert_equal_parts(spectrum.gradient(view, X, square), naive_parts(view, X, square))


def test_steps_of_every_kind_together():
    view, (W, *_) = by_hand(6)
    steps = [
        Step(kind="transition", branch=lambda t, h: h.exp()),
        view.steps[0],
        Step(kind="plain", branch=lambda t, h: (h @ W).cos()),
        view.steps[1].deleted(),
        replace(view.steps[2], shortcut=lambda h: h @ W, post=torch.sin).deleted(),
        Step(kind="plain", branch=lambda t, h: h).deleted(),
        Step(kind="transition", branch=lambda t, h: h[:, :2]),
        Step(kind="residual", branch=lambda t, h: h.flip(1).square(), shortcut=torch.sin),
        Step(kind="plain", branch=lambda t, h: h.flip(1).square()),
    ]
    view = view.with_steps(steps)
    found = spectrum.gradient(view, X, square)
    assert found.counts == (0, 0, 1, 2, 1)
    assert_equal_parts(found, naive_parts(view, X, square))
    assert not found.parts[:2].any()


def test_a_linear_net_with_one_branch_has_binomial_coefficients_times_powers():
    """v (I + z A)^n A^p z^p: the part of length k + p is C(n, k) v A^(k + p)."""
    n, p = 9, 2
    A = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 2
    residual = Step(kind="residual", branch=lambda t, h: h @ A.T)
    plain = Step(kind="plain", branch=lambda t, h: h @ A.T)
    steps = [residual] * 4 + [plain] + [residual] * 5 + [plain]
    view = ResidualDynamics(lambda x: x, steps, lambda h: h)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = spectrum.gradient(view, x, lambda z: (v * z).sum())
    expected = [torch.zeros_like(x)] * p + [
        math.comb(n, k) * v @ torch.linalg.matrix_power(A, k + p) for k in range(n + 1)
    ]
    torch.testing.assert_close(found.parts, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["basic", "preact", "rk4"])
def test_a_lesioned_network_has_the_spectrum_of_what_is_left(name):
    net, x = small_net(name)
    view = (delete(1) >> scale(-0.5, 2))(dynamics(net))
    with view.evaluation():
        expected = naive_parts(view, x, cross_entropy)
    found = spectrum.gradient(view, x, cross_entropy)
    assert len(found.parts) == len(spectrum.gradient(dynamics(net), x, cross_entropy).parts) - 1
    assert_equal_parts(found, expected)


def test_a_branch_scaled_by_0_takes_no_path_but_its_step_is_still_counted():
    net, x = net_of("preact", scale="skipinit"), batch("preact")
    view = dynamics(net)
    found = spectrum.gradient(view, x, cross_entropy)
    blocks = sum(isinstance(step.scale, torch.Tensor) for step in view.steps)
    assert blocks == 4
    assert len(found.parts) == len(view.steps) + 1 == 7
    assert not found.parts[3:].any()
    assert all(part.norm() > 0 for part in found.parts[:3])
    with torch.no_grad():
        for step in view.steps:
            if isinstance(step.scale, torch.Tensor):
                step.scale.fill_(0.5)
    found = spectrum.gradient(view, x, cross_entropy)
    assert (found.total - gradient_of(net, x)).norm() <= 1e-13 * sizes(found)
    assert found.parts[6].norm() > 0


def test_branches_that_do_not_depend_on_the_state_have_no_paths_through_them():
    view, _ = by_hand(2)
    constant = Step(kind="residual", branch=lambda t, h: torch.ones_like(h))
    found = spectrum.gradient(view.with_steps([constant, *view.steps, constant]), X, square)
    assert len(found.parts) == 5
    assert not found.parts[3:].any()
    expected = spectrum.gradient(
        ResidualDynamics(lambda x: 2.0 * x + 1.0, view.steps, lambda h: (h + 1.0).sin()), X, square
    )
    torch.testing.assert_close(found.parts[:3], expected.parts, rtol=1e-12, atol=1e-12)
    nothing = spectrum.gradient(view.with_steps([Step(kind="plain", branch=constant.branch)]), X, square)
    assert nothing.parts.shape == (2, 2, 3)
    assert not nothing.parts.any()
    assert nothing.shares.isnan().all()


# Fewer lengths, and other states


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", ["basic", "plain", "rk4", "midpoint", "dopri5"])
def test_longer_paths_than_max_length_are_summed_up(name, grade):
    net, x = net_of(name), batch(name)
    view = dynamics(net)
    whole = spectrum.gradient(view, x, cross_entropy, grade=grade)
    for most in (0, 1, 3, len(whole.parts) - 2):
        found = spectrum.gradient(view, x, cross_entropy, most, grade)
        assert found.parts.shape[0] == most + 1
        torch.testing.assert_close(found.parts, whole.parts[: most + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.rest, whole.parts[most + 1 :].sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.shares, whole.shares[: most + 1], rtol=1e-10, atol=1e-10)
        assert found.counts == whole.counts
    for most in (len(whole.parts) - 1, 1000):
        found = spectrum.gradient(view, x, cross_entropy, most, grade)
        assert torch.equal(found.parts, whole.parts)
        assert found.rest is None


@pytest.mark.parametrize("name", ["basic", "vgg", "rk4"])
def test_gradients_in_the_state_before_any_step(name):
    net, x = net_of(name), batch(name)
    view, count = dynamics(net), len(dynamics(net).steps)
    with view.evaluation():
        before = states(view, x)
        for at in (0, 2, count):
            found = spectrum.gradient(view, x, cross_entropy, at=at)
            h = before[at].requires_grad_()
            with torch.enable_grad():
                (expected,) = torch.autograd.grad(cross_entropy(view.head(view.run(h, at))), h)
            assert (found.total - expected).norm() <= 1e-13 * sizes(found)
            assert found.counts == lengths.counts(view.steps[at:])
    assert found.parts.shape == (1, *before[-1].shape)


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", ["basic", "plain", "midpoint"])
def test_the_spectra_of_all_states_are_those_of_each(name, grade):
    net, x = net_of(name), batch(name)
    view = dynamics(net)
    for most in (None, 2):
        table = spectrum.by_step(view, x, cross_entropy, most, grade)
        assert table.norms.shape == table.shares.shape
        assert len(table.norms) == len(table.counts) == len(table.labels) == len(view.steps) + 1
        for at in range(len(view.steps) + 1):
            found = spectrum.gradient(view, x, cross_entropy, most, grade, at)
            k = len(found.parts)
            torch.testing.assert_close(table.norms[at, :k], found.norms, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(table.shares[at, :k], found.shares, rtol=1e-10, atol=1e-12)
            assert not table.norms[at, k:].any()
            assert not table.shares[at, k:].any()
            assert float(table.gradient_norms[at]) == pytest.approx(float(norms_of(found.total).mean()))
            assert table.counts[at] == found.counts
    assert table.labels == (*(step.label for step in view.steps), "head")
    assert table.stages == (*(step.stage for step in view.steps), 3)
    assert json.loads(json.dumps(table.to_dict()))["norms"] == table.norms.tolist()


# What is said of the parts


def norms_of(h):
    return torch.stack([sample.norm() for sample in h])


def test_norms_and_shares():
    net, x = net_of("basic"), batch("basic", 5)
    view = dynamics(net)
    found = spectrum.gradient(view, x, cross_entropy)
    each = torch.stack([norms_of(part) for part in found.parts])
    torch.testing.assert_close(found.sample_norms, each)
    torch.testing.assert_close(found.norms, each.mean(1))
    gradient = gradient_of(net, x)
    shares = [(part * gradient).sum() / gradient.square().sum() for part in found.parts]
    torch.testing.assert_close(found.shares, torch.stack(shares))
    # A sum over samples gives each its own gradient: a sample alone has the same.
    alone = spectrum.gradient(view, x[:1], cross_entropy)
    torch.testing.assert_close(alone.sample_norms[:, 0], found.sample_norms[:, 0])
    said = json.loads(json.dumps(found.to_dict()))
    assert said["norms"] == found.norms.tolist()
    assert said["shares"] == found.shares.tolist()
    assert said["counts"] == [math.comb(6, k) for k in range(7)]
    assert said["norm"] == pytest.approx(float(norms_of(gradient).mean()))
    assert (said["samples"], said["grade"], said["rest"]) == (5, "step", None)
    cut = spectrum.gradient(view, x, cross_entropy, 2).to_dict()
    assert cut["rest"] == pytest.approx(float(norms_of(found.parts[3:].sum(0)).mean()))
    assert cut["norm"] == pytest.approx(said["norm"])
    assert len(cut["norms"]) == 3


def test_tiny_parts_have_norms_in_single_precision():
    step = Step(kind="residual", branch=lambda t, h: 1e-8 * h)
    view = ResidualDynamics(lambda x: x, [step] * 4, lambda h: h)
    found = spectrum.gradient(view, torch.ones(2, 3), torch.sum)
    expected = [math.comb(4, k) * 1e-8**k * math.sqrt(3) for k in range(5)]
    assert found.norms.tolist() == pytest.approx(expected, rel=1e-5)


# How it is computed


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("together", [3, 100])
@pytest.mark.parametrize("name", ["basic", "tied", "vgg", "rk4", "dopri5"])
def test_parts_that_share_a_backward_pass_are_the_same(name, together, grade):
    net, x = net_of(name), batch(name, 2)
    view = dynamics(net)
    for most in (None, 3):
        one = spectrum.gradient(view, x, cross_entropy, most, grade)
        many = spectrum.gradient(view, x, cross_entropy, most, grade, together=together)
        torch.testing.assert_close(many.parts, one.parts, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(many.total, one.total, rtol=1e-12, atol=1e-14)


class Counted(torch.autograd.Function):
    """Half of h, with a note of each evaluation and each backward pass."""

    calls: ClassVar = []

    @staticmethod
    def forward(ctx, h, weight):
        Counted.calls.append("forward")
        return 0.5 * h

    @staticmethod
    def backward(ctx, g):
        Counted.calls.append("weight" if ctx.needs_input_grad[1] else "backward")
        return 0.5 * g, None


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, t, h):
        return Counted.apply(h, self.weight)


def cost(run):
    Counted.calls.clear()
    run()
    return {kind: Counted.calls.count(kind) for kind in ("forward", "backward", "weight")}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_cost_of_a_spectrum(count):
    """Two evaluations of each branch; backward as many as parts there are after it. No gradient of a weight."""
    view, x = dynamics(nn.Sequential(*[ResidualBlock(Half()) for _ in range(count)])), torch.ones(2, 3)
    found = cost(lambda: spectrum.gradient(view, x, torch.sum))
    assert found == {"forward": 2 * count, "backward": count * (count + 1) // 2, "weight": 0}
    found = cost(lambda: spectrum.gradient(view, x, torch.sum, 1))
    assert found == {"forward": 2 * count, "backward": sum(min(i, 2) for i in range(1, count + 1)), "weight": 0}
    found = cost(lambda: spectrum.by_step(view, x, torch.sum))
    assert found == {"forward": 2 * count, "backward": count * (count + 1) // 2, "weight": 0}
    plain = ResidualDynamics(nn.Identity(), [Step(kind="plain", branch=Half())] * count, nn.Identity())
    assert cost(lambda: spectrum.gradient(plain, x, torch.sum))["weight"] == count  # its one part, of no model


def test_images_keep_their_order_of_memory():
    net, x = net_of("basic", torch.float32), batch("basic", dtype=torch.float32)
    view = dynamics(net)
    plain = spectrum.gradient(view, x, cross_entropy)
    found = spectrum.gradient(view, x.contiguous(memory_format=torch.channels_last), cross_entropy)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in found.parts)
    assert all(part.is_contiguous() for part in plain.parts)
    torch.testing.assert_close(found.total, plain.total, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.norms, plain.norms, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.shares, plain.shares, rtol=1e-3, atol=1e-4)


# What others' networks do


def test_activations_that_overwrite_the_sum():
    def blocks(inplace):
        torch.manual_seed(0)
        found = [ResidualBlock(Branch(3, Stack(norm="none"), "mlp"), post=nn.ReLU(inplace)) for _ in range(3)]
        return nn.Sequential(nn.Linear(3, 3), *found, nn.ReLU(inplace), nn.Linear(3, 2)).double()

    found = spectrum.gradient(dynamics(blocks(True)), X, square)
    expected = spectrum.gradient(dynamics(blocks(False)), X, square)
    assert torch.equal(found.parts, expected.parts)
    found = spectrum.jvp(dynamics(blocks(True)), X, X)
    assert torch.equal(found.parts, spectrum.jvp(dynamics(blocks(False)), X, X).parts)


def test_a_step_that_overwrites_its_state_is_refused():
    step = Step(kind="plain", branch=lambda t, h: h.exp_(), label="exp")
    view = ResidualDynamics(lambda x: x + 1, [step], lambda h: h)
    with pytest.raises(InvalidInput, match=r"step 'exp' changes the state it is given in place .*inplace=False"):
        spectrum.gradient(view, X, square)
    with pytest.raises(InvalidInput, match="the branch changes the state it is given in place"):
        spectrum.gradient(view.with_steps([replace(step, kind="residual")]), X, square)


def test_states_that_are_indices_before_the_stem():
    torch.manual_seed(0)
    embed, x = nn.Embedding(7, 3).double(), torch.tensor([1, 5])
    view, _ = by_hand()
    view = ResidualDynamics(embed, view.steps, view.head)
    with pytest.raises(InvalidInput, match=r"x is of torch.int64: .* use x.float\(\) .* or at=0"):
        spectrum.gradient(view, x, square)
    found = spectrum.gradient(view, x, square, at=0)
    h = embed(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(square(view.head(view.run(h))), h)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    assert spectrum.by_step(view, x, square).norms.shape == (5, 5)


def test_the_model_is_left_as_it_was():
    net, x = net_of("basic", stack=Stack(dropout=Dropout(p=0.3))), batch("basic")
    for i, module in enumerate(net.modules()):
        module.training = i % 3 > 0
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 4 > 0)
    modes = [module.training for module in net.modules()]
    held = {key: value.clone() for key, value in net.state_dict().items()}
    random, view, wanted = torch.get_rng_state(), dynamics(net), [p.requires_grad for p in net.parameters()]
    runs = [
        lambda: spectrum.gradient(view, x, cross_entropy).total,
        lambda: spectrum.by_step(view, x, cross_entropy).norms,
        lambda: spectrum.jvp(view, x, x).total,
        lambda: sum(gradient for _, gradient in spectrum.paths(view, x, cross_entropy)),
        lambda: torch.tensor(spectrum.sampled(view, x, cross_entropy, 2).norms),
    ]
    for run in runs:
        first = run()
        assert not first.requires_grad
        assert [module.training for module in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == wanted
        assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled()
        # In evaluation mode, whatever the mode was; and whether or not gradients are on.
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(run(), first)
    with torch.inference_mode():
        assert torch.equal(spectrum.gradient(view, x.clone(), cross_entropy).total, runs[0]())
        assert torch.equal(spectrum.jvp(view, x.clone(), x.clone()).total, runs[2]())
    with pytest.raises(ZeroDivisionError):
        spectrum.gradient(view, x, lambda z: 1 / 0)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wanted


# What cannot be


@pytest.mark.parametrize("analysis", [spectrum.gradient, spectrum.by_step, spectrum.sampled, spectrum.paths])
def test_a_net_in_the_place_of_its_view_is_refused(analysis):
    with pytest.raises(InvalidInput, match=r"a view of a network is expected, and this is a Net; give resode.dynamics"):
        analysis(net_of("basic"), batch("basic"), square)
    with pytest.raises(InvalidInput, match="this is a Net"):
        spectrum.jvp(net_of("basic"), batch("basic"), batch("basic"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "x is of torch.int64"),
        ({"x": torch.tensor(1.0)}, r"x is of shape \(\): a batch"),
        ({"x": torch.ones(0, 3)}, r"x is of shape \(0, 3\): a batch of at least one"),
        ({"x": [1.0]}, "x is a list: a batch"),
        ({"loss": lambda z: z.square().sum(1)}, r"the loss gives a tensor of shape \(2,\).*reduction='sum'"),
        ({"loss": lambda z: z.sum().item()}, "the loss gives a float: a tensor of one number"),
        ({"loss": lambda z: z.argmax().double()}, "the loss does not depend on the state before the head"),
        ({"loss": lambda z: z.detach().sum()}, "the loss does not depend on the state before the head"),
        ({"max_length": -1}, "max_length is -1"),
        ({"max_length": 1.5}, "max_length is 1.5"),
        ({"grade": "stage"}, "unknown grade.*'stage': choose from step, evaluation"),
        ({"at": 5}, "at is 5: the states before the 4 steps, and after the last, are 0 … 4"),
        ({"at": -1}, "at is -1"),
        ({"together": 0}, "together is 0"),
    ],
)
def test_what_is_refused(change, says):
    view, _ = by_hand()
    with pytest.raises(InvalidInput, match=says):
        spectrum.gradient(**{"view": view, "x": X, "loss": square, **change})


def test_states_without_derivatives_are_refused():
    view, _ = by_hand(2)
    with pytest.raises(InvalidInput, match=r"the stem gives a tensor of torch.int64: derivatives need"):
        spectrum.gradient(ResidualDynamics(lambda x: x.long(), view.steps, view.head), X, square)
    odd = Step(kind="transition", branch=lambda t, h: h > 0, label="mask")
    with pytest.raises(InvalidInput, match=r"step 'mask' gives a tensor of torch.bool"):
        spectrum.gradient(view.with_steps([*view.steps, odd]), X, square)
    with pytest.raises(InvalidInput, match=r"step 'pair' gives a tuple"):
        spectrum.gradient(view.with_steps([replace(odd, branch=lambda t, h: (h, h), label="pair")]), X, square)
    with pytest.raises(InvalidInput, match="the loss does not depend on"):
        spectrum.gradient(ResidualDynamics(view.stem, view.steps, lambda h: torch.ones(2, 2)), X, square)
