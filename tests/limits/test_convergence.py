"""Convergence in the number of steps, on flows that are known in closed form."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack, build, solver_settings
from resode.blocks import TABLEAUX, Branch, ProjectedODE
from resode.limits import ConvergenceTable, convergence
from resode.runs.values import dump, jsonable

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "bosh3": 3, "rk4": 4}


class Linear(nn.Module):
    """f(t, h) = (1 + 3t²) h Aᵀ, whose flow from 0 to 1 is h ↦ h exp(2A)ᵀ."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(4, 4, dtype=torch.float64, generator=generator)
        self.register_buffer("A", 0.4 * A)

    def forward(self, t, h):
        return (1 + 3 * t**2) * h @ self.A.T


def linear_net(solver="rk4", steps=None, **settings):
    torch.manual_seed(0)
    return nn.Sequential(ODEBlock(Linear(), solver, steps, **settings), nn.Linear(4, 3, dtype=torch.float64))


def data(sizes=(5, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, dtype=dtype, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def exact(net, x):
    """The logits of the exact flow."""
    with torch.no_grad():
        return net[1](x @ torch.linalg.matrix_exp(2 * net[0].branch.A).T)


def settings_of(net):
    names = ("solver", "steps", "rtol", "atol", "gradient")
    return [tuple(getattr(block, name) for name in names) for block in net.modules() if isinstance(block, ODEBlock)]


# Errors and orders


@pytest.mark.parametrize("solver", ORDERS)
def test_the_orders_on_a_known_flow_are_those_of_the_solvers(solver):
    table = convergence(linear_net(), data(), (8, 16, 32), [solver], reference_steps=512)
    orders = [each.order for each in table.evaluations]
    assert orders[0] is None
    assert orders[1:] == pytest.approx([ORDERS[solver]] * 2, abs=0.25)
    assert abs(orders[2] - ORDERS[solver]) < abs(orders[1] - ORDERS[solver])


@pytest.mark.parametrize("solver", ORDERS)
def test_errors_are_those_to_the_exact_flow(solver):
    net, batches = linear_net(), data()
    table = convergence(net, batches, (1, 4), [solver], reference_steps=512)
    truth = torch.cat([exact(net, x) for x, _ in batches])
    for each in table.evaluations:
        with solver_settings(net, solver=solver, steps=each.steps), torch.no_grad():
            logits = torch.cat([net(x) for x, _ in batches])
        assert each.logit_error == pytest.approx(float((logits - truth).norm() / truth.norm()), rel=1e-6)


def test_accuracy_and_loss_are_over_all_samples():
    net, batches = linear_net("euler", 2), data((5, 2))
    labels = torch.cat([labels for _, labels in batches])
    table = convergence(net, batches, (2,), reference_steps=256)
    with torch.no_grad():
        logits = torch.cat([net(x) for x, _ in batches])
    truth = torch.cat([exact(net, x) for x, _ in batches])
    (each,) = table.evaluations
    assert table.count == 7
    assert each.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert each.loss == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert table.reference_accuracy == float((truth.argmax(1) == labels).double().mean())
    assert table.reference_loss == pytest.approx(float(F.cross_entropy(truth, labels)), rel=1e-6)


def test_a_solver_as_good_as_the_reference_has_no_error_and_no_order():
    table = convergence(linear_net(), data(), (4, 8), ["rk4"], reference_steps=8)
    assert [each.logit_error == 0.0 for each in table.evaluations] == [False, True]
    assert table.evaluations[1].order is None


def test_an_order_is_taken_from_half_the_steps_alone():
    table = convergence(linear_net(), data(), (2, 3, 4, 5, 6, 12), ["heun"])
    errors = {each.steps: each.logit_error for each in table.evaluations}
    orders = {each.steps: each.order for each in table.evaluations}
    assert [steps for steps, order in orders.items() if order is None] == [2, 3, 5]
    for steps in (4, 6, 12):
        assert orders[steps] == pytest.approx(math.log2(errors[steps // 2] / errors[steps]))


# What is evaluated


def test_the_number_of_evaluations_is_stages_times_steps_times_blocks():
    net = nn.Sequential(ODEBlock(Linear()), ODEBlock(Linear(), "euler"), nn.Linear(4, 3, dtype=torch.float64))
    table = convergence(net, data(), (1, 3), list(ORDERS))
    found = {(each.solver, each.steps): each.nfe for each in table.evaluations}
    assert found == {(s, n): 2 * n * TABLEAUX[s].solution_stages for s in ORDERS for n in (1, 3)}


def test_solvers_and_steps_come_in_order():
    table = convergence(linear_net(), data(), (4, 1, 2), ["rk4", "euler"])
    plan = [(s, n) for s in ("rk4", "euler") for n in (1, 2, 4)]
    assert [(each.solver, each.steps) for each in table.evaluations] == plan
    assert table.reference_steps == 8


@pytest.mark.parametrize(
    ("trained", "steps", "used"),
    [
        ("euler", 3, "euler"),
        ("heun", None, "heun"),
        ("dopri5", 3, "dopri5"),
        ("dopri5", None, "rk4"),
        ("explicit_adams", 8, "rk4"),
    ],
)
def test_without_solvers_the_nets_own_is_taken_or_rk4_for_one_without_steps_of_its_own(trained, steps, used):
    """A pair with a number of steps is a fixed-step solver; an Adams method's steps are not from one state alone."""
    table = convergence(linear_net(trained, steps), data(), (1, 2))
    assert {each.solver for each in table.evaluations} == {used}
    assert table.trained == ((trained, 8 if trained == "heun" else steps),)


def test_an_adaptive_net_is_compared_on_fixed_grids():
    net = linear_net("dopri5", rtol=1e-10, atol=1e-10)
    table = convergence(net, data(), (16, 32), ["midpoint"], reference_steps=256)
    assert table.evaluations[1].order == pytest.approx(2, abs=0.1)
    assert settings_of(net) == [("dopri5", None, 1e-10, 1e-10, "backprop")]
    with torch.no_grad():
        x = data()[0][0]
        torch.testing.assert_close(net(x), exact(net, x), rtol=1e-7, atol=1e-7)


def test_a_net_of_ours_approaches_its_flow():
    # A smooth field: on one of ReLUs no order shows.
    stack = Stack(norm="none", activation="tanh")
    config = NetConfig(net="odenet", kind="preact", width=4, size=(4, 4), classes=3, stack=stack, steps=(1, 2, 3))
    net = build(config, seed=0).double()
    batches = [(torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))]
    table = convergence(net, batches, (4, 8), ["euler", "rk4"])
    found = {(each.solver, each.steps): each for each in table.evaluations}
    assert found["euler", 8].order == pytest.approx(1, abs=0.4)
    assert found["rk4", 8].order == pytest.approx(4, abs=0.8)
    assert table.trained == (("rk4", 1), ("rk4", 2), ("rk4", 3))
    assert found["rk4", 4].nfe == 3 * 16


def test_the_data_may_come_from_a_generator():
    net, batches = linear_net(), data()
    assert convergence(net, iter(batches), (1, 2), progress=True) == convergence(net, batches, (1, 2))


# By stage


def flow_of(time):
    """exp((t + t³) A), the flow of `Linear` from 0."""
    return torch.linalg.matrix_exp((time + time**3) * Linear().A)


def stages_net():
    """Two flows with a layer between them: one to t = 1, and one from 0 to 0.8."""
    torch.manual_seed(1)
    between, last = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
    return nn.Sequential(ODEBlock(Linear()), between, nn.Sequential(ODEBlock(Linear(), t1=0.8)), last)


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_errors_by_stage_are_those_of_the_states_to_the_exact_flows(solver):
    net, batches = stages_net(), data((5, 3, 2))
    table = convergence(net, batches, (2, 4), [solver], reference_steps=512)
    assert table.stages == ("0", "2.0")
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        truth = [x @ flow_of(1.0).T]
        truth.append(net[1](truth[0]) @ flow_of(0.8).T)
        for each in table.evaluations:
            with solver_settings(net, solver=solver, steps=each.steps):
                first = net[0](x)
                states = [first, net[2](net[1](first))]
            errors = [float((h - g).norm() / g.norm()) for h, g in zip(states, truth, strict=True)]
            assert each.stage_errors == pytest.approx(errors, rel=1e-6)


def test_orders_by_stage_are_the_solvers():
    table = convergence(stages_net(), data(), (16, 32), list(ORDERS), reference_steps=512)
    for coarse, fine in zip(table.evaluations[::2], table.evaluations[1::2], strict=True):
        assert coarse.stage_orders == (None, None)
        assert fine.stage_orders == pytest.approx([ORDERS[fine.solver]] * 2, abs=0.2)
        errors = zip(coarse.stage_errors, fine.stage_errors, strict=True)
        assert fine.stage_orders == pytest.approx([math.log2(a / b) for a, b in errors])


def test_our_nets_have_a_state_for_each_stage():
    config = NetConfig(net="odenet", width=4, size=(4, 4), classes=3, steps=(1, 2, 3))
    batches = [(torch.randn(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64))]
    table = convergence(build(config, seed=0), batches, (1, 2))
    assert table.stages == ("stages.0.0", "stages.1.1", "stages.2.1")
    assert all(len(each.stage_errors) == len(each.stage_orders) == 3 for each in table.evaluations)


def test_a_block_used_twice_is_two_stages():
    block = ODEBlock(Linear())
    net = nn.Sequential(block, nn.Tanh(), block, nn.Linear(4, 3, dtype=torch.float64))
    table = convergence(net, data(), (1, 2))
    assert table.stages == ("0", "0")
    assert len(set(table.evaluations[0].stage_errors)) == 2


def test_states_are_those_of_the_blocks_whatever_overwrites_them():
    torch.manual_seed(0)
    last = nn.Linear(4, 3, dtype=torch.float64)
    nets = [nn.Sequential(ODEBlock(Linear()), nn.ReLU(inplace=inplace), last) for inplace in (False, True)]
    one, other = (convergence(net, data(), (1, 2)) for net in nets)
    assert one == other


def test_no_hook_is_left_on_a_block():
    net = stages_net()
    convergence(net, data(), (1,))
    with pytest.raises(RuntimeError):
        convergence(net, [(torch.rand(2, 9, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))])
    assert not any(block._forward_hooks for block in net.modules())


def test_projected_dynamics_are_compared_with_themselves_on_a_finer_grid():
    net = nn.Sequential(ProjectedODE(Linear(), nn.ReLU(), 4), nn.Linear(4, 3, dtype=torch.float64))
    batches = [(x.abs(), labels) for x, labels in data()]
    table = convergence(net, batches, (16, 32), reference_steps=512)
    assert (table.reference_solver, table.evaluations[0].solver) == ("euler", "euler")
    assert table.evaluations[1].stage_orders[0] == pytest.approx(1, abs=0.3)
    with pytest.raises(InvalidInput, match="solver='euler' alone"):
        convergence(net, batches, (16,), ["rk4"])


def test_the_reference_of_projected_dynamics_is_fine_enough_to_tell_the_order():
    net = nn.Sequential(ProjectedODE(Linear(), nn.ReLU(), 4), nn.Linear(4, 3, dtype=torch.float64))
    table = convergence(net, [(x.abs(), labels) for x, labels in data()], (32, 64, 128))
    assert table.reference_steps == 8 * 128
    # The reference's own error is 1/8 of the last one's: log2((2 − 1/8)/(1 − 1/8)).
    assert table.evaluations[-1].stage_orders[0] == pytest.approx(math.log2(15 / 7), abs=0.05)


# Where there is nothing to divide by, or no number


class Stiff(nn.Module):
    """f(t, h) = −1000 h: 32 steps of Euler's method, by −30 each, end beyond the numbers of float32."""

    def forward(self, t, h):
        return -1e3 * h


def test_answers_that_are_no_numbers_are_infinitely_off_and_wrong():
    net = nn.Sequential(ODEBlock(Stiff(), "euler", 4), nn.Linear(4, 3))
    batches = [(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))]
    table = convergence(net, batches, (4, 8, 32), reference_steps=1024)
    few, more, blown = table.evaluations
    assert math.isfinite(few.logit_error)
    assert more.order == pytest.approx(math.log2(few.logit_error / more.logit_error))
    assert (blown.logit_error, blown.accuracy, blown.order) == (math.inf, 0.0, None)
    assert blown.stage_errors == (math.inf,)
    again = ConvergenceTable.from_dict(json.loads(dump(jsonable(table.to_dict()))))
    assert again.evaluations[0].logit_error == few.logit_error
    assert math.isnan(again.evaluations[2].logit_error), "JSON has no infinity"
    assert math.isnan(again.evaluations[2].stage_errors[0])
    # A reference that is no number is no truth, either.
    table = convergence(net, batches, (8, 32), reference_steps=32)
    assert (table.reference_accuracy, {each.order for each in table.evaluations}) == (0.0, {None})
    assert {each.logit_error for each in table.evaluations} == {math.inf}


def test_logits_that_are_all_0_have_no_error():
    net = linear_net()
    for p in net[1].parameters():
        nn.init.zeros_(p)
    table = convergence(net, data(), (1, 2))
    assert [(each.logit_error, each.order) for each in table.evaluations] == [(0.0, None)] * 2
    assert all(each.stage_errors[0] > 0.0 for each in table.evaluations)


# The net is left alone


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_settings_modes_and_weights_are_restored(solver):
    tolerances = {"rtol": 1e-2, "atol": 1e-5} if solver == "dopri5" else {}
    config = NetConfig(net="odenet", solver=solver, width=4, size=(4, 4), gradient="adjoint", **tolerances)
    net = build(config, seed=0)
    for i, module in enumerate(net.modules()):
        module.training = i % 2 == 0
    modes = [module.training for module in net.modules()]
    before, held = settings_of(net), {key: value.clone() for key, value in net.state_dict().items()}
    batches = [(torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64))]
    table = convergence(net, batches, (1, 2))
    assert settings_of(net) == before
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    # It is measured in evaluation mode, whatever the mode was.
    assert convergence(net.eval(), batches, (1, 2)) == table


def test_settings_and_modes_are_restored_after_an_error():
    net = linear_net("bosh3", rtol=1e-2)
    before = settings_of(net)
    with pytest.raises(RuntimeError):
        convergence(net, [(torch.rand(2, 9, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))])
    assert settings_of(net) == before
    assert all(module.training for module in net.modules())


# Refusals


def test_a_net_without_ode_blocks_is_refused():
    for net in (nn.Linear(4, 3), nn.Sequential(ResidualBlock(Branch(4, kind="mlp")))):
        with pytest.raises(InvalidInput, match=f"this {type(net).__name__} has none"):
            convergence(net, data())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"solvers": ["implicit_adams"]}, "unknown fixed-step solver 'implicit_adams'.*euler, midpoint, heun, .*rk4"),
        ({"solvers": ["euler", "rk5"]}, "unknown fixed-step solver 'rk5'"),
        ({"steps": ()}, "needs numbers of steps"),
        ({"steps": (0,)}, "steps is 0"),
        ({"steps": (4, -1)}, "steps is -1"),
        ({"steps": (1.5,)}, "steps is 1.5"),
        ({"steps": (1, 2), "reference_steps": 0}, "steps is 0"),
        ({"steps": (1, 2), "reference_steps": 1.5}, "steps is 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_evaluated(settings, says):
    net = linear_net()
    net.register_forward_pre_hook(lambda *_: pytest.fail("the net was evaluated"))
    with pytest.raises(InvalidInput, match=says):
        convergence(net, data(), **settings)


def test_grids_that_step_over_a_breakpoint_are_refused_before_anything_is_evaluated():
    net = nn.Sequential(ODEBlock(Branch(4, kind="mlp", time="constant", knots=2), "euler", 2))
    net.register_forward_pre_hook(lambda *_: pytest.fail("the net was evaluated"))
    with pytest.raises(InvalidInput, match=r"3 steps .* breakpoint t = 0\.5"):
        convergence(net, data(), (2, 3))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"time": "fourier", "steps": 3}, (1, 2, 4, 8, 16, 32, 64)),
        ({"time": "concat", "steps": 5, "mask_intervals": 5}, (1, 2, 4, 8, 16, 32, 64)),  # no masks in evaluation
        ({"time": "linear", "steps": (3, 2, 2)}, (6, 12, 24, 48)),
        ({"time": "constant", "steps": 8}, (8, 16, 32, 64)),
    ],
)
def test_the_usual_steps_are_those_that_the_weights_allow(settings, expected):
    shape = {"width": 4, "size": (4, 4), "classes": 3, "stack": Stack(dropout=Dropout(p=0.1))}
    net = build(NetConfig(net="odenet", solver="euler", **settings, **shape), seed=0)
    batches = [(torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))]
    table = convergence(net, batches, solvers=["euler"], reference_steps=expected[0])
    assert tuple(each.steps for each in table.evaluations) == expected


def test_breakpoints_that_no_usual_grid_has_are_refused():
    class Jump(Linear):
        breakpoints = (0.123456,)

    with pytest.raises(InvalidInput, match=r"up to 64 .* breakpoints \[0\.123456\]"):
        convergence(nn.Sequential(ODEBlock(Jump(), "dopri5"), nn.Linear(4, 3)), data())


def test_no_data_is_an_error():
    for none in ([], iter(())):
        with pytest.raises(InvalidInput, match="convergence needs data"):
            convergence(linear_net(), none)


# Tables


def test_a_table_survives_json():
    net = nn.Sequential(ODEBlock(Linear()), ODEBlock(Linear(), "euler"), nn.Linear(4, 3, dtype=torch.float64))
    table = convergence(net, data(), (1, 2, 3), ["euler", "rk4"])
    again = ConvergenceTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert any(each.order is not None for each in again.evaluations)
    assert any(each.order is None for each in again.evaluations)
    assert all(type(each.stage_errors) is type(each.stage_orders) is tuple for each in again.evaluations)


def test_a_table_without_stages_is_read_too():
    """As it was made before there were any."""
    held = convergence(linear_net(), data(), (1, 2)).to_dict()
    del held["stages"], held["reference_solver"]
    for each in held["evaluations"]:
        del each["stage_errors"], each["stage_orders"]
    table = ConvergenceTable.from_dict(json.loads(json.dumps(held)))
    assert (table.stages, table.reference_solver, table.evaluations[0].stage_errors) == ((), "rk4", ())
    assert table.evaluations[1].order is not None
