"""What must hold across rooms: the identities that make one branch at two depths one thing."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import resode
from resode.blocks import KINDS, TABLEAUX, TIMES, Branch, ODEBlock, ResidualBlock
from resode.layers import BASES, DROPOUTS, NORMS
from resode.layers.basis import knots_of
from resode.layers.norm import index_statistics
from resode.nets import NETS, Architecture, NetConfig, build
from resode.stack import ACTIVATIONS, Dropout, Stack
from resode.train import Data, Recipe, Setup, load, train


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def state(kind: str, batch: int = 4, channels: int = 8, size: int = 6) -> torch.Tensor:
    shape = (batch, channels) if kind == "mlp" else (batch, channels, size, size)
    return torch.randn(shape, dtype=torch.float64)


# --- a tied Euler ODE net is the residual net -------------------------------------------------------------------------


def knots_for(time: str, steps: int) -> dict[str, int]:
    """A piece a step for weights that vary with t, so that the grid has their knots."""
    return {"knots": knots_of(time, steps)} if time in BASES else {}


def tied_twin(block: ODEBlock) -> nn.Sequential:
    """The residual net with the block's own branch at t_l = l/N, scale 1/N."""
    N = block.steps
    return nn.Sequential(*(ResidualBlock(block.branch, scale="1/L", t=i / N, depth=N) for i in range(N)))


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_euler_ode_block_is_the_tied_residual_net_in_outputs_and_gradients(kind, time):
    branch = Branch(8, Stack(norm="group"), kind, time, **knots_for(time, 7)).double()
    block = ODEBlock(branch, "euler", steps=7)
    x = state(kind)
    outputs, gradients = [], []
    for net in (block, tied_twin(block)):
        branch.zero_grad()
        inputs = x.clone().requires_grad_()
        out = net(inputs)
        (out**3).sum().backward()
        outputs.append(out.detach())
        gradients.append([inputs.grad, *(p.grad.clone() for p in branch.parameters())])
    assert relative(*outputs) <= 1e-12
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 1e-12 * max(float(expected.norm()), 1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_identity_holds_with_batch_norm(training):
    block = ODEBlock(Branch(8, Stack(), "preact", "concat").double(), "euler", steps=5)
    for _ in range(3):  # statistics that differ from knot to knot
        block(state("preact"))
    twin = tied_twin(block)
    block.train(training), twin.train(training)
    x = state("preact")
    assert relative(block(x), twin(x)) <= 1e-12


def test_whole_nets_agree_an_euler_ode_net_and_the_tied_residual_net():
    """Depth 26 has stages of 4, 1 + 3 and 1 + 3 blocks; the ODE net makes 4, 3 and 3 Euler steps."""
    stack = Stack(dropout=Dropout("unit", 0.0))
    shared = {"stack": stack, "kind": "preact", "time": "concat", "depth": 26, "size": (8, 8)}
    ode = build(NetConfig(net="odenet", solver="euler", steps=(4, 3, 3), **shared)).double()
    residual = build(NetConfig(net="resnet", tied=True, scale="1/L", **shared)).double()
    # Same parameters in the same order; the ODE net holds each branch once, the residual net at every block.
    for own, other in zip(residual.parameters(), ode.parameters(), strict=True):
        own.data.copy_(other.data)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for net in (ode, residual):
        net.train()
    assert relative(residual(x), ode(x)) <= 1e-12
    # After that one training pass the statistics are at the same knots, and evaluation agrees as well.
    ode.eval(), residual.eval()
    assert relative(residual(x), ode(x)) <= 1e-12


def test_masks_by_interval_make_the_ode_block_the_twin_of_the_residual_net_with_dropout():
    """With N mask intervals, N Euler steps draw the masks that N tied residual blocks draw."""
    branch = Branch(8, Stack(norm="group", dropout=Dropout("unit", 0.3))).double()
    block = ODEBlock(branch, "euler", steps=6, mask_intervals=6)
    x = state("preact")
    torch.manual_seed(5)
    continuous = block(x)
    torch.manual_seed(5)
    discrete = tied_twin(block)(x)
    assert relative(continuous, discrete) <= 1e-12


# --- every named part builds, trains, and is trained ------------------------------------------------------------------

SMALL = {"lenet5": 32, "alexnet": 32, "vgg": 8, "plain": 8, "resnet": 8, "odenet": 8}


def train_two_steps(net: nn.Module, x: torch.Tensor) -> list[str]:
    """Two steps of SGD; the parameters whose gradient is missing, zero or not finite after the second.

    Two, since a parameter that starts at zero (SkipInit) hides those behind it in the first.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        out = net(x)
        (out - torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view_as(out[0])).square().mean().backward()
        optimizer.step()
    return [
        name
        for name, p in net.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() <= 1e-14
    ]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_net_trains_with_every_norm_and_every_parameter_gets_a_gradient(net, norm):
    size = SMALL[net]
    depth, blocks = 8, 2
    config = NetConfig(net=net, depth=depth, blocks=blocks, width=8, steps=2, size=(size, size), stack=Stack(norm=norm))
    model = build(config, seed=0).double()
    assert train_two_steps(model, torch.randn(8, 3, size, size, dtype=torch.float64)) == []


@pytest.mark.parametrize(("kind", "time", "norm"), list(product(KINDS, sorted({*TIMES} - {*BASES}), NORMS)))
@pytest.mark.parametrize("continuous", [False, True])
def test_every_branch_trains_and_every_parameter_gets_a_gradient(kind, time, norm, continuous):
    if kind == "mlp" and norm == "instance":
        with pytest.raises(resode.InvalidInput, match="instance norm"):
            Branch(8, Stack(norm=norm), kind, time)
        return
    branch = Branch(8, Stack(norm=norm), kind, time).double()
    block = ODEBlock(branch, "midpoint", steps=2) if continuous else ResidualBlock(branch, t=0.3)
    silent = train_two_steps(block, state(kind, batch=8))
    assert [name for name in silent if not removed_by_norm(branch, name)] == []


def removed_by_norm(branch: Branch, name: str) -> bool:
    """A shift that is constant over what the next norm averages over: batch and instance norm remove it, whole.

    For the time map of a linear layer, and of a 1×1 convolution (whose map has no borders), that is so by design.
    """
    layer = branch.get_submodule(name.removeprefix("branch.").rpartition(".")[0])
    single = branch.stack.norm == "group" and branch.kind == "bottleneck"  # groups of one channel: an instance norm
    removing = branch.stack.norm in ("batch", "instance") or single
    pointwise = isinstance(layer, nn.Linear) or getattr(layer, "kernel_size", None) == (1, 1)
    return name.endswith("time_weight") and removing and pointwise


@pytest.mark.parametrize("kind", DROPOUTS)
@pytest.mark.parametrize("net", ["resnet", "odenet", "plain"])
def test_every_dropout_trains(kind, net):
    stack = Stack(dropout=Dropout(kind, 0.2), input_dropout=0.1)
    model = build(NetConfig(net=net, depth=8, width=8, steps=2, size=(8, 8), stack=stack), seed=0).double()
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    assert train_two_steps(model, x) == []
    assert not torch.equal(model(x), model(x)), "a new forward draws new masks"
    model.eval()
    assert torch.equal(model(x), model(x)), "evaluation draws none"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains(activation):
    model = build(NetConfig(net="odenet", width=8, steps=2, size=(8, 8), stack=Stack(activation=activation)), seed=0)
    assert train_two_steps(model.double(), torch.randn(8, 3, 8, 8, dtype=torch.float64)) == []


@pytest.mark.parametrize("scale", ["skipinit", "1/L", "1/sqrt(L)", 0.5])
def test_every_scale_trains(scale):
    model = build(NetConfig(net="resnet", depth=14, width=8, size=(8, 8), scale=scale), seed=0).double()
    assert train_two_steps(model, torch.randn(8, 3, 8, 8, dtype=torch.float64)) == []


@pytest.mark.parametrize("net", ["plain", "resnet", "odenet"])
def test_nets_for_points_train(net):
    # Batch norm removes the shift t·w of a linear layer before it; layer norm leaves but the sign of two coordinates.
    stack = Stack(norm="layer" if net == "odenet" else "batch")
    shape = {"channels": 2, "size": None, "classes": 2}
    config = NetConfig(net=net, kind="mlp", expansion=8, depth=8, steps=2, stack=stack, **shape)
    assert train_two_steps(build(config, seed=0).double(), torch.randn(16, 2, dtype=torch.float64)) == []


# --- the view is the net ----------------------------------------------------------------------------------------------

VIEWED = {
    **{net: {"net": net, "size": (SMALL[net],) * 2} for net in NETS},
    "preact": {"net": "resnet", "kind": "preact"},
    "bottleneck": {"net": "resnet", "kind": "bottleneck", "shortcut": "projection"},
    "skipinit": {"net": "resnet", "scale": "skipinit"},
    "tied": {"net": "resnet", "tied": True, "scale": "1/L"},
    "dropout": {"net": "odenet", "stack": Stack(dropout=Dropout("path", 0.3, "linear"))},
    "standardized": {"net": "odenet", "stack": Stack(conv="weight-standardized", norm="group")},
    "film": {"net": "odenet", "time": "film"},
    **{time: {"net": "odenet", "time": time} for time in BASES},
    "pieces": {"net": "resnet", "tied": True, "time": "constant"},
    **{solver: {"net": "odenet", "solver": solver} for solver in TABLEAUX},
}


@pytest.mark.parametrize("name", VIEWED)
def test_the_view_of_a_net_is_the_net(name):
    config = NetConfig(**{"depth": 14, "blocks": 2, "width": 8, "steps": 3, "size": (8, 8), **VIEWED[name]})
    model = build(config, seed=0).double()
    x = torch.randn(5, 3, *config.size, dtype=torch.float64)
    train_two_steps(model, x)
    view = resode.dynamics(model, example=x)
    with view.evaluation():
        assert relative(view(x), model(x)) <= 1e-13
    assert model.training


# --- orders of convergence --------------------------------------------------------------------------------------------


class Pendulum(nn.Module):
    """A smooth autonomous field without a closed form: (θ, ω)' = (ω, −sin θ)."""

    def forward(self, t, h):
        return torch.stack([h[:, 1], -torch.sin(h[:, 0])], dim=1)


class Driven(nn.Module):
    """A smooth field that depends on t, with solution h = sin(3t) + h₀·exp(−t²): h' = 3 cos 3t − 2t (h − sin 3t)."""

    def forward(self, t, h):
        t = torch.as_tensor(t, dtype=h.dtype)
        return 3 * torch.cos(3 * t) - 2 * t * (h - torch.sin(3 * t))

    def exact(self, h):
        return torch.sin(torch.tensor(3.0, dtype=h.dtype)) + h * torch.exp(torch.tensor(-1.0, dtype=h.dtype))


class Pieces(nn.Module):
    """Piecewise-constant θ(t): h' = A_i h + cos(t) on four pieces, by the documented attribute and function."""

    breakpoints = (0.25, 0.5, 0.75)

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(4, 2, 2, dtype=torch.float64))

    def forward(self, t, h):
        A = self.A[min(3, int(4 * resode.interval_time(t)))]
        return h @ A.T + torch.cos(torch.as_tensor(t, dtype=h.dtype))


def order(branch: nn.Module, solver: str, exact, x: torch.Tensor, steps=(64, 128, 256, 512)) -> float:
    """Slope of log error against log step, where the error exceeds rounding."""
    errors = [float((ODEBlock(branch, solver, n)(x) - exact).norm()) for n in steps]
    points = [(np.log(1 / n), np.log(e)) for n, e in zip(steps, errors, strict=True) if e > 1e-12]
    assert len(points) >= 3
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


# The methods of higher order have their own problems, in tests/blocks: these fields are too smooth for them.
@pytest.mark.parametrize("field", [Pendulum, Driven, Pieces])
@pytest.mark.parametrize("solver", [name for name, tableau in TABLEAUX.items() if tableau.order <= 4])
def test_fixed_grids_converge_at_the_order_of_their_tableau(solver, field):
    branch = field()
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    exact = branch.exact(x) if field is Driven else ODEBlock(branch, "rk4", 4096)(x).detach()
    with torch.no_grad():
        assert order(branch, solver, exact, x) == pytest.approx(TABLEAUX[solver].order, abs=0.1)


def test_a_grid_that_steps_over_a_breakpoint_is_refused():
    with pytest.raises(resode.InvalidInput, match=r"breakpoint t = 0\.25"):
        ODEBlock(Pieces(), "rk4", 6)


@pytest.mark.parametrize(
    ("solver", "tol"), [("dopri5", 1e-8), ("dopri8", 1e-8), ("bosh3", 1e-6), ("adaptive_heun", 1e-5)]
)
@pytest.mark.parametrize("field", [Driven, Pieces])
def test_adaptive_solvers_reach_their_tolerance(solver, tol, field):
    branch = field()
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        exact = branch.exact(x) if field is Driven else ODEBlock(branch, "rk4", 4096)(x)
        assert relative(ODEBlock(branch, solver, rtol=tol, atol=tol)(x), exact) < 50 * tol


# --- the contract of a solve ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_two_forwards_then_both_backwards_give_the_gradients_of_each(gradient, solver):
    """With dropout, standardized weights and batch norm: everything that could be left behind by the other solve."""
    stack = Stack(dropout=Dropout("unit", 0.3), conv="weight-standardized", activation="tanh")
    steps = None if solver == "dopri5" else 4
    block = ODEBlock(Branch(8, stack, time="concat").double(), solver, steps, gradient=gradient)
    xs = [state("preact"), state("preact")]

    def losses():
        torch.manual_seed(3)
        return [(block(x) ** 2).sum() for x in xs]

    def gradients():
        return [p.grad.clone() for p in block.parameters()]

    together = losses()
    separate = []
    for i in (0, 1):
        block.zero_grad()
        losses()[i].backward()
        separate.append(gradients())
    for i in (1, 0):  # and in the other order than the forwards
        block.zero_grad()
        together[i].backward()
        for found, expected in zip(gradients(), separate[i], strict=True):
            assert torch.equal(found, expected)


def test_one_block_used_twice_in_a_net_is_two_solves():
    block = ODEBlock(Branch(8, Stack(norm="group")).double(), "rk4", steps=3, gradient="adjoint")
    net, copies = nn.Sequential(block, block), nn.Sequential(block, copy.deepcopy(block))
    x = state("preact")
    net(x).square().sum().backward()
    shared = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    copies(x).square().sum().backward()
    for total, first, second in zip(shared, block.parameters(), copies[1].parameters(), strict=True):
        assert (total - first.grad - second.grad).norm() <= 1e-12 * total.norm()


def test_statistics_of_tied_blocks_are_indexed_by_their_times():
    branch = Branch(4, Stack()).double()
    index_statistics(branch, [0.0, 0.5])
    first, second = (ResidualBlock(branch, t=t) for t in (0.0, 0.5))
    x = state("preact", channels=4)
    first(x), second(10.0 + x)
    norm = branch.layers[0]
    assert norm.running_mean.shape == (2, 4)
    assert (norm.running_mean[1] - norm.running_mean[0]).min() > 0.9, "momentum 0.1 of a mean that is 10 higher"


def test_a_trajectory_gathers_the_statistics_of_the_solve_and_no_others():
    block = ODEBlock(Branch(4, Stack()).double(), "rk4", steps=2)
    other = copy.deepcopy(block)
    x = state("preact", channels=4)
    block(x), other.trajectory(x, [0.1, 0.5, 0.7, 1.0])
    for name, value in block.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    other.trajectory(x, [0.5])
    norm, before = other.branch.layers[0], block.branch.layers[0]
    assert torch.equal(norm.running_mean[-1], before.running_mean[-1]), "the solve did not reach the last knot"
    assert not torch.equal(norm.running_mean[0], before.running_mean[0])


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["resnet", "odenet", "vgg"])
def test_a_save_and_load_gives_identical_outputs(net, tmp_path):
    architecture = Architecture(net=net, depth=8, width=4, steps=2, blocks=2)
    setup = Setup(architecture=architecture, data=Data(), recipe=Recipe(epochs=1, batch_size=256))
    run = train(setup, tmp_path / "run")
    one, other = load(run.path), load(run.path)
    x, _ = next(iter(one.data.batches("test", 64)))
    assert torch.equal(one.model(x), other.model(x))
    accuracy = resode.train.evaluate(other.model, other.data.batches("test", 512)).accuracy
    assert accuracy == run.result("train")["test"]["accuracy"], "the loaded net is the one that was evaluated"
