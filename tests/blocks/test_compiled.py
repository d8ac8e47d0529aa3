"""Compiled steps: the same solve as the eager one, by graphs that are made once.

Most tests let torch.compile stop before it makes graphs of the derivatives and generates code (the backend "eager"),
which takes ten seconds a graph; what is traced, and what compiles it anew, is the same.
"""

import copy
import math
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from resode.blocks import GRADIENTS, Branch, ODEBlock, collect_penalties, compiled
from resode.errors import InvalidInput
from resode.layers.context import interval_time
from resode.layers.dropout import DROPOUTS
from resode.layers.norm import NORMS
from resode.stack import Dropout, Stack

# Dynamo looks at the .grad of every input it is given, and hides the warning of torch's that this may bring.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def graphs(monkeypatch, request):
    """The graphs that were compiled since, by a backend that generates no code."""
    backend = getattr(request, "param", "eager")
    torch._dynamo.reset()
    counters.clear()
    real, made = torch.compile, []

    def cheap(graph, *, mode, **options):
        assert mode == "default"
        made.append(graph)
        return real(graph, backend=backend, **options)

    monkeypatch.setattr(compiled.torch, "compile", cheap)
    return made


def with_derivatives(test):
    """For a test that shall compile the graphs of the derivatives, too."""
    return pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)(test)


class Again:
    """No graph is traced, compiled or compiled again within."""

    def __init__(self, graphs):
        self.graphs = graphs

    def __enter__(self):
        self.before = len(self.graphs)
        self.dynamo = torch._dynamo.config.patch(error_on_recompile=True)
        self.dynamo.__enter__()
        self.compiled = counters["stats"]["unique_graphs"]

    def __exit__(self, *problem):
        self.dynamo.__exit__(*problem)
        if problem == (None, None, None):
            assert len(self.graphs) == self.before
            assert counters["stats"]["unique_graphs"] == self.compiled


def state(seed=1, dtype=torch.float64, batch=3):
    x = torch.randn(batch, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


ADAPTIVE = {"rtol": 1e-2, "atol": 1e-2}
STACK = Stack(activation="tanh", conv="weight-standardized", dropout=Dropout("unit", 0.3))


def block_of(compile, solver="rk4", gradient="backprop", stack=STACK, time="concat", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    settings = settings or ({"steps": 3} if solver != "bosh3" else ADAPTIVE)
    return ODEBlock(Branch(4, stack, time=time).to(dtype), solver, gradient=gradient, compile=compile, **settings)


def solve(block, x, seed=2):
    """All that a solve gives: its end, gradients, statistics, counts, and what is left of the random numbers."""
    torch.manual_seed(seed)
    out = block(x)
    found = torch.autograd.grad(out.float().square().sum(), (x, *block.parameters()))
    left = torch.get_rng_state()
    return (out.detach(), *found), [b.clone() for b in block.buffers()], copy.copy(block.stats), left


def assert_same(one, other, allowed):
    for a, b in zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True):
        a, b = a.double(), b.double()
        assert (a - b).norm() <= allowed * max(float(b.norm()), 1e-3)
    assert one[2] == other[2], "evaluations and steps"
    assert torch.equal(one[3], other[3]), "random numbers drawn"


# --- the same solve --------------------------------------------------------------------------------------------------


@with_derivatives
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["midpoint", "bosh3"])
def test_values_gradients_statistics_masks_and_counts_are_those_of_the_eager_solve(solver, gradient, graphs):
    eager, fast = (block_of(compile, solver, gradient) for compile in (False, True))
    assert_same(solve(fast, state()), solve(eager, state()), 1e-10)  # the first steps are traced
    assert_same(solve(fast, state(3), 4), solve(eager, state(3), 4), 1e-10)
    with Again(graphs):
        for seed in (5, 6):
            assert_same(solve(fast, state(seed), seed), solve(eager, state(seed), seed), 1e-10)
    if solver == "midpoint":  # without gradients forward and with them backward; a reversible step also by −Δ
        assert len(graphs) == {"backprop": 1, "checkpoint": 2, "reversible": 3, "adjoint": 2}[gradient]


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_single_precision_agrees_to_its_rounding(gradient):
    eager, fast = (block_of(compile, "midpoint", gradient, dtype=torch.float32, steps=5) for compile in (False, True))
    for seed in (1, 2):
        x = state(seed, torch.float32)
        assert_same(solve(fast, x, seed), solve(eager, x, seed), 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_images_that_lie_channels_last_are_solved_alike(norm):
    """A trace may take a norm's output to lie in the other order of memory."""
    settings = {"stack": Stack(activation="tanh", norm=norm), "dtype": torch.float32, "steps": 3}
    eager, fast = (block_of(compile, "midpoint", **settings) for compile in (False, True))
    for seed in (1, 2):
        x = state(seed, torch.float32, batch=17).detach().contiguous(memory_format=torch.channels_last)
        assert_same(solve(fast, x.requires_grad_(), seed), solve(eager, x, seed), 1e-5)


OTHERS = {
    **{f"{kind} in 3 intervals": {"stack": Stack(activation="tanh", norm="group", dropout=Dropout(kind, 0.3)),
        "steps": 3, "mask_intervals": 3} for kind in DROPOUTS},
    **{norm: {"stack": Stack(activation="tanh", norm=norm)} for norm in ("layer", "pixel", "instance", "none")},
    **{time: {"time": time, "steps": 4} for time in ("film", "linear", "fourier", "constant")},
    "extra channels": {"steps": 2, "extra_channels": 2},
    "two intervals, adaptive": {"solver": "bosh3", **ADAPTIVE, "mask_intervals": 2},
    "error by sample": {"solver": "bosh3", **ADAPTIVE, "error_norm": "sample"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_branches_and_settings_agree_too(name):
    """By the adjoint, whose forward pass runs compiled steps and whose backward pass compiled slopes."""
    settings = {"gradient": "adjoint", **OTHERS[name]}
    extra = settings.get("extra_channels", 0)
    pair = []
    for compile in (False, True):
        torch.manual_seed(0)
        own = {"solver": "midpoint", "steps": 3, **settings} if "solver" not in settings else dict(settings)
        stack, time = own.pop("stack", STACK), own.pop("time", "concat")
        knots = {"knots": 4} if time == "constant" else {}
        branch = Branch(4 + extra, stack, time=time, **knots).double()
        pair.append(ODEBlock(branch, compile=compile, **own))
    for seed in (1, 2):
        eager, fast = (solve(block, state(seed), seed) for block in pair)
        assert_same(fast, eager, 1e-10)


@pytest.mark.parametrize("solver", ["midpoint", "bosh3"])
def test_evaluation_uses_the_statistics_at_each_time_and_follows_them(solver, graphs):
    eager, fast = (block_of(compile, solver, steps=4) for compile in (False, True))
    for _ in range(2):  # statistics that differ from knot to knot
        for block in (eager, fast):
            solve(block, state())
    eager.eval(), fast.eval()
    with torch.no_grad():
        for seed in (1, 2):
            torch.testing.assert_close(fast(state(seed)), eager(state(seed)), rtol=1e-12, atol=1e-12)
        with Again(graphs):
            before = fast(state())
            for block in (eager, fast):
                for layer in block.branch.layers:
                    if hasattr(layer, "running_mean"):
                        layer.running_mean += torch.linspace(0.0, 1.0, 5, dtype=torch.float64)[:, None]
            torch.testing.assert_close(fast(state()), eager(state()), rtol=1e-12, atol=1e-12)
            assert not torch.allclose(fast(state()), before)
        fast.train(), eager.train()  # training again without gradients: moments are met
        for block in (eager, fast):
            torch.manual_seed(3)
            block(state())
        for a, b in zip(fast.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_penalties_agree(gradient, layout):
    """Their noise too, which is drawn in the order of memory."""
    found = []
    for compile in (False, True):
        block = block_of(compile, "euler", gradient, steps=3, kinetic=0.1, jacobian=0.2)
        for seed in (1, 2):
            torch.manual_seed(seed)
            x = state(seed).detach().contiguous(memory_format=layout).requires_grad_()
            with collect_penalties() as penalties:
                out = block(x)
            loss = out.square().sum() + 10.0 * sum(penalties)
            found.append((loss.detach(), *torch.autograd.grad(loss, (x, *block.parameters()))))
    for eager, fast in zip(found[:2], found[2:], strict=True):
        for a, b in zip(fast, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("time", "gradient"), [*(("concat", gradient) for gradient in GRADIENTS), ("linear", "backprop")]
)
def test_under_autocast_the_casts_are_those_of_the_eager_steps(gradient, time, graphs):
    """Weights on a basis are summed in float32 inside the autocast region: the graph must not cast that again."""
    eager, fast = (
        block_of(compile, "midpoint", gradient, dtype=torch.float32, time=time, steps=4) for compile in (False, True)
    )
    for seed in (1, 2):
        outs = []
        for block in (fast, eager):
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(solve(block, state(seed, torch.float32), seed))
        assert_same(*outs, 2.0 * torch.finfo(torch.bfloat16).eps)
    with Again(graphs), torch.autocast("cpu", torch.bfloat16):
        solve(fast, state(3, torch.float32))
    with torch.no_grad():  # the same block without autocast is another graph, not that one
        torch.manual_seed(1)
        found = fast(state(3, torch.float32))
        torch.manual_seed(1)
        torch.testing.assert_close(found, eager(state(3, torch.float32)), rtol=1e-5, atol=1e-5)


class Pieces(nn.Module):
    """dh/dt = tanh(h W_i), with W_1 before t = ½ and W_2 after, chosen by tensors alone."""

    breakpoints = (0.5,)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(2, 4, 4, dtype=torch.float64, generator=generator))

    def forward(self, t, h):
        late = torch.as_tensor(interval_time(t) > 0.5)
        return torch.tanh(h @ torch.where(late, self.W[1], self.W[0]))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("settings", [{"steps": 4}, {"solver": "bosh3", "rtol": 1e-4}])
def test_the_stages_of_a_step_use_its_own_piece(settings, gradient):
    """Those of an adjoint solve as well, which are compiled one by one."""
    x, found = torch.randn(3, 4, dtype=torch.float64).requires_grad_(), []
    for compile in (False, True):
        block = ODEBlock(Pieces(), gradient=gradient, compile=compile, **settings)
        for _ in range(2):
            grads = torch.autograd.grad(block(x).square().sum(), (x, *block.parameters()))
        found.append(grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


# --- compiled once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["midpoint", "bosh3"])
def test_nothing_that_changes_in_a_training_compiles_again(solver, gradient, graphs):
    """Times, step sizes, weights, statistics, the number of steps, a step of the optimizer; only a shape does."""
    block = block_of(True, solver, gradient)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)

    def train(seed, batch=3):
        optimizer.zero_grad()
        torch.manual_seed(seed)
        block(state(seed, batch=batch)).square().mean().backward()
        optimizer.step()

    for seed in range(2):
        train(seed)
    with Again(graphs):
        for seed in range(2, 5):
            train(seed)
        block.t1 = 0.7
        if solver == "midpoint":
            block.steps = 5
        else:
            block.rtol = block.atol = 1e-4
        train(6)
        assert block.stats.accepted >= 3
    made = len(graphs)
    train(7, batch=2)
    assert len(graphs) > made, "another shape is another graph"
    with Again(graphs):
        train(8)


class Counting(nn.Module):
    """A branch that counts its evaluations, as many do."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.5 * torch.eye(4, dtype=torch.float64))
        self.scale, self.nested, self.hung = 1.0, {"scales": [1.0]}, torch.ones(4, dtype=torch.float64)
        self.evaluations = 0

    def forward(self, t, h):
        self.evaluations += 1
        return self.scale * self.nested["scales"][0] * torch.tanh(h @ self.W) * (1.0 + t) + self.hung


def test_a_counter_of_the_branch_is_no_setting(graphs):
    block, x = ODEBlock(Counting(), steps=3, compile=True), torch.ones(2, 4, dtype=torch.float64)
    block(x), block(x)
    assert len(graphs) == 2, "the input needs no gradient, and the second step's state does"
    with Again(graphs):
        for _ in range(3):
            block(x)
            assert block.stats.nfe_forward == 12


@pytest.mark.parametrize("change", ["scale", "nested", "hung", "hung in place", "training flag"])
def test_a_setting_or_a_tensor_of_the_branch_that_changes_is_followed(change):
    """Whatever the branch holds: a graph that kept the old value would be wrong without a word."""
    branch, x = Counting(), torch.ones(2, 4, dtype=torch.float64)
    block, eager = ODEBlock(branch, steps=3, compile=True), ODEBlock(branch, steps=3)
    for _ in range(2):
        before = block(x)
    if change == "scale":
        branch.scale = 2.0
    elif change == "nested":
        branch.nested["scales"][0] = 2.0
    elif change == "hung":
        branch.hung = torch.full((4,), 2.0, dtype=torch.float64)
    elif change == "hung in place":
        branch.hung.mul_(3.0)
    else:
        branch.act = nn.Identity()  # another module in the branch
        branch.forward = lambda t, h: (0.5 if branch.training else 1.0) * h
        before = block(x)
        block(x), block.eval(), eager.eval()
    for _ in range(2):
        torch.testing.assert_close(block(x), eager(x), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(block(x), before)


def test_a_tensor_hung_on_a_module_gets_its_gradient_with_backprop():
    source, branch = torch.ones(4, dtype=torch.float64, requires_grad=True), Counting()
    x, found = torch.ones(2, 4, dtype=torch.float64), []
    for block in (ODEBlock(branch, steps=3), ODEBlock(branch, steps=3, compile=True)):
        for _ in range(2):
            branch.hung = 2.0 * source
            (grad,) = torch.autograd.grad(block(x).square().sum(), source)
        found.append(grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_deep_copy_and_a_pickle_start_without_graphs_and_are_the_same_net(graphs):
    block = block_of(True, "midpoint", steps=3)
    solve(block, state())
    twins = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    expected = solve(block, state(3))
    for twin in twins:
        made = len(graphs)
        assert_same(solve(twin, state(3)), expected, 1e-12)
        assert len(graphs) == made + 1, "its own"


@pytest.mark.parametrize("jacobian", [0.0, 0.1])
def test_torchs_kernel_of_group_norm_stays_in_the_graph_unless_it_is_differentiated_twice(jacobian, graphs):
    block = block_of(True, "euler", stack=Stack(norm="group"), steps=2, jacobian=jacobian)
    with collect_penalties():
        block(state())
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert ("resode.group_norm.default" in called) == (jacobian == 0.0)
    assert ("aten.native_group_norm.default" in called) == (jacobian > 0.0)
    assert "resode.spread.default" in called


# --- within a model under torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_model_that_is_compiled_around_a_block_is_the_eager_one_and_is_compiled_once(gradient, graphs):
    def net_of():
        block = block_of(False, "midpoint", gradient)
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), block, nn.Flatten(), nn.Linear(100, 3)).double()

    eager, net = net_of(), net_of()
    whole = torch.compile(net, mode="default")
    graphs.clear()

    def train(model, seed):
        torch.manual_seed(seed)
        model(state(seed)).square().mean().backward()

    for seed in range(2):
        train(whole, seed), train(eager, seed)
    with Again(graphs):
        for seed in range(2, 4):
            train(whole, seed), train(eager, seed)
            assert net[1].stats == eager[1].stats
            assert net[1].stats.accepted == 3
    for a, b in zip((*net.buffers(), *net.parameters()), (*eager.buffers(), *eager.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


# --- what no graph shows ---------------------------------------------------------------------------------------------


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, t, h):
        return torch.tanh(h @ self.W) * (1.0 + t)


class Draws(Tanh):
    def forward(self, t, h):
        return super().forward(t, h) + 0.1 * torch.randn_like(h)


class Stops(Tanh):
    """A gate whose gradient is stopped by no_grad."""

    def forward(self, t, h):
        with torch.no_grad():
            gate = torch.sigmoid(h @ self.W)
        return super().forward(t, h) * gate


class Detaches(Tanh):
    def forward(self, t, h):
        return super().forward(t, h) * torch.sigmoid(h @ self.W).detach()


class Straight(torch.autograd.Function):
    """sign(x), with the gradient of x."""

    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Custom(Tanh):
    def forward(self, t, h):
        return Straight.apply(super().forward(t, h)) * h


@pytest.mark.parametrize("branch", [Draws, Stops, Detaches, Custom])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_branch_that_a_graph_would_change_is_refused(branch, gradient):
    block = ODEBlock(branch(), steps=2, gradient=gradient, compile=True)
    with pytest.raises(InvalidInput, match="use compile=False"):
        block(torch.ones(2, 4, dtype=torch.float64, requires_grad=True)).square().sum().backward()


class Looks(Tanh):
    def forward(self, t, h):
        return super().forward(t, h) * (2.0 if h.mean() > 0.0 else 1.0)


class LooksAtTime(Tanh):
    def forward(self, t, h):
        return super().forward(t, h) * math.sin(t)


@pytest.mark.parametrize("branch", [Looks, LooksAtTime])
def test_a_branch_that_looks_at_values_is_refused_with_the_way_out(branch):
    block = ODEBlock(branch(), steps=2, compile=True)
    with pytest.raises(InvalidInput, match=r"cannot be traced.*values of its tensors.*compile=False"):
        block(torch.ones(2, 4, dtype=torch.float64))
    block.compile_mode = None
    block(torch.ones(2, 4, dtype=torch.float64))


def test_a_tensor_that_no_module_holds_is_refused():
    table = [torch.ones(4, dtype=torch.float64)]

    class Elsewhere(Tanh):
        def forward(self, t, h):
            return super().forward(t, h) * table[0]

    with pytest.raises(InvalidInput, match=r"none of its modules holds.*register it"):
        ODEBlock(Elsewhere(), steps=2, compile=True)(torch.ones(2, 4, dtype=torch.float64))


def test_a_branch_that_changes_the_shape_is_refused_as_without_compiling():
    class Wider(Tanh):
        def forward(self, t, h):
            return torch.cat([h, h], 1)

    with pytest.raises(InvalidInput, match="must keep the shape"):
        ODEBlock(Wider(), steps=2, compile=True)(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_transforms_of_torch_func_and_forward_mode_run_the_steps_as_they_are():
    x, v = (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    eager, fast = (ODEBlock(Tanh(), steps=2, compile=compile) for compile in (False, True))
    fast(x), fast(x)
    for transformed in (
        lambda block: torch.func.grad(lambda x: block(x).sum())(x),
        lambda block: torch.func.vmap(block)(x[:, None]),
    ):
        assert torch.equal(transformed(fast), transformed(eager))
    for block in (fast, eager):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x, v))).tangent
        (expected,) = torch.autograd.functional.jvp(eager, x, v)[1:]
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@with_derivatives
def test_a_second_derivative_of_compiled_steps_is_an_error_and_not_a_zero():
    block, x = ODEBlock(Tanh(), steps=2, compile=True), torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    block(x), block(x)
    (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler was found")
def test_the_code_that_is_generated_gives_the_eager_solve(monkeypatch):
    """With torch's own backend: the whole way, once."""
    monkeypatch.undo()
    eager, fast = (
        block_of(compile, "euler", stack=Stack(activation="tanh"), time="concat", dtype=torch.float32, steps=2)
        for compile in (False, True)
    )
    for seed in (1, 2):
        x = state(seed, torch.float32)
        assert_same(solve(fast, x, seed), solve(eager, x, seed), 1e-5)


def test_a_graph_belongs_to_the_mode_of_its_solve_whatever_the_block_is_in_by_then():
    """A solve in training whose backward pass comes after eval(), and then one in evaluation."""
    found = {}
    for compile in (False, True):
        block = ODEBlock(Branch(4, Stack(activation="tanh")).double(), "euler", 2, gradient="adjoint", compile=compile)
        block.load_state_dict(found.setdefault("state", copy.deepcopy(block.state_dict())))
        for training in (True, False):
            x = state()
            block.train(training)
            out = block(x).square().sum()
            block.eval()
            found[compile, training] = torch.autograd.grad(out, x)[0]
    for training in (True, False):
        torch.testing.assert_close(found[True, training], found[False, training], rtol=1e-10, atol=1e-12)
