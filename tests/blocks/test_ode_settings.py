"""Settings of an ODE block: those that are refused, how many steps they make, and other ones for a while."""

import math

import pytest
import torch
from fields import Clock, Field, Linear, randn
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock, solver_settings
from resode.blocks.settings import SOLVERS
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.errors import InvalidInput, SolverError

# --- settings that make no sense -------------------------------------------------------------------------------------

LOOSE = {"solver": "dopri5", "rtol": 1e-3}
REFUSALS = [
    ({"solver": "rk45"}, rf"'rk45': choose from {', '.join(SOLVERS)}"),
    ({"gradient": "exact"}, r"'exact': choose from backprop, checkpoint, reversible, adjoint"),
    ({"error_norm": "max"}, r"'max': choose from batch, sample"),
    ({"steps": 0}, r"steps is 0"),
    ({"steps": -1}, r"steps is -1"),
    ({"steps": 2.0}, r"steps is 2\.0: a whole number"),
    ({"steps": True}, r"steps is True: a whole number"),
    ({"solver": "dopri5", "max_steps": 0}, r"max_steps is 0"),
    ({"rtol": 1e-3}, r"rtol is 0\.001, and rk4 makes fixed steps: leave rtol out, .*dopri5"),
    ({"atol": 1e-3}, r"atol is 0\.001, and rk4 makes fixed steps"),
    ({"first_step": 0.1}, r"first_step is 0\.1, and rk4 makes fixed steps"),
    ({"min_step": 0.1}, r"min_step is 0\.1, and rk4 makes fixed steps"),
    ({"solver": "explicit_adams", "rtol": 1e-3}, r"rtol is 0\.001, and explicit_adams makes fixed steps"),
    ({**LOOSE, "steps": 4}, r"rtol is 0\.001, and dopri5 shall make 4 steps: .*without a number of steps"),
    ({"solver": "tsit5", "steps": 4, "min_step": 0.1}, r"min_step is 0\.1, and tsit5 shall make 4 steps"),
    ({"solver": "dopri5", "rtol": 0.0}, r"rtol is 0\.0"),
    ({"solver": "dopri5", "atol": -1e-3}, r"atol is -0\.001"),
    ({"solver": "dopri5", "atol": math.nan}, r"atol is nan"),
    ({"solver": "dopri5", "rtol": math.inf}, r"rtol is inf"),
    ({"solver": "dopri5", "first_step": 0.0}, r"first_step is 0\.0"),
    ({"solver": "dopri5", "min_step": -1.0}, r"min_step is -1\.0"),
    ({"solver": "dopri5", "first_step": 0.1, "min_step": 0.2}, r"first_step is 0\.1, below min_step = 0\.2"),
    ({"t0": 1.0}, r"t0 = 1 to t1 = 1: t1 must be the larger"),
    ({"t0": 2.0, "t1": 1.0}, r"t0 = 2 to t1 = 1"),
    ({"t1": math.inf}, r"t1 = inf"),
    ({"t0": math.nan}, r"t0 = nan"),
    ({"coupling": 0.0}, r"coupling is 0\.0: a number in \(0, 1\]"),
    ({"coupling": 1.01}, r"coupling is 1\.01"),
    ({"coupling": math.nan}, r"coupling is nan"),
    ({"kinetic": -0.1}, r"kinetic is -0\.1: a finite number of at least 0"),
    ({"kinetic": math.inf}, r"kinetic is inf"),
    ({"jacobian": -1.0}, r"jacobian is -1\.0"),
    ({"jacobian": math.nan}, r"jacobian is nan"),
    ({"steer": -0.1}, r"steer is -0\.1"),
    ({"steer": 1.0}, r"steer is 1, and the interval \[0, 1\] is no longer"),
    ({"steer": 0.5, "t0": 0.75}, r"steer is 0\.5, and the interval \[0\.75, 1\]"),
    ({"extra_channels": -1}, r"extra_channels is -1: a whole number of at least 0"),
    ({"extra_channels": 1.5}, r"extra_channels is 1\.5: a whole number"),
    *(
        ({"solver": solver, "gradient": gradient}, rf"gradient='{gradient}' needs a one-step solver, and {solver}")
        for solver in MULTISTEP
        for gradient in ("checkpoint", "reversible")
    ),
    ({"compile": "fast"}, r"'fast': choose from default"),
    ({"mask_intervals": 0}, r"mask_intervals is 0"),
    ({"mask_intervals": 2.5}, r"mask_intervals is 2\.5"),
    ({"knots": 0}, r"knots is 0"),
    ({"knots": -3}, r"knots is -3"),
    ({"steps": 4, "mask_intervals": 3}, r"4 steps .* steps over the breakpoint"),
    ({"steps": 4, "mask_intervals": 4, "steer": 0.1}, r"steer is 0\.1, and f .* jumps at t = 0\.25.*dopri5.*steer=0"),
]
LATE = [r for r in REFUSALS if not {"mask_intervals", "knots", "compile"} & set(r[0])]
"""Those of settings that may be changed on a block."""


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_settings_that_make_no_sense_are_refused_at_once(settings, message):
    with pytest.raises(InvalidInput, match=message):
        ODEBlock(Branch(4), **settings)


@pytest.mark.parametrize(("settings", "message"), LATE)
def test_settings_changed_later_are_refused_when_they_are_used(settings, message):
    block = ODEBlock(Field())
    for name, value in settings.items():
        setattr(block, name, value)
    with pytest.raises(InvalidInput, match=message):
        block(randn(2, 4))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_random_end_and_jumps_go_together_in_adaptive_solves_alone(solver):
    field = Field()
    field.breakpoints = (0.5,)
    if solver == "dopri5":
        ODEBlock(field, solver, steer=0.25)(randn(2, 4))
    for steps in (4, 8):
        with pytest.raises(InvalidInput, match=r"steer is 0\.25, and f .* jumps at t = 0\.5"):
            ODEBlock(field, solver, steps=steps, steer=0.25)


# --- how many steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_number_of_steps_an_embedded_pair_is_adaptive_and_the_others_make_eight(solver):
    block, x = ODEBlock(Clock(), solver), randn(2, 4)
    block(x)
    assert block.grid_steps == (None if solver in ADAPTIVE else 8)
    first = block.stats
    block.steps = 8
    block(x)
    assert (block.stats.accepted, block.stats.rejected) == (8, 0)
    assert (first == block.stats) is (solver not in ADAPTIVE)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_embedded_pair_with_a_number_of_steps_is_its_tableau_on_a_fixed_grid(solver):
    block, x = ODEBlock(Field(), solver, steps=3), randn(2, 4)
    out = block(x)
    assert block.stats.nfe_forward == 3 * TABLEAUX[solver].solution_stages
    with solver_settings(block, steps=5):
        assert not torch.equal(block(x), out)
    assert torch.equal(block(x), out)


# --- solver_settings -------------------------------------------------------------------------------------------------

NAMES = ("solver", "steps", "rtol", "atol", "gradient", "max_steps", "first_step", "min_step", "error_norm")


def settings_of(model):
    return [{n: getattr(b, n) for n in NAMES} for b in model.modules() if isinstance(b, ODEBlock)]


def test_solver_settings_hold_for_a_while_in_every_block():
    model = nn.Sequential(ODEBlock(Linear(), "euler", 3), nn.Sequential(ODEBlock(Linear(), "dopri5", rtol=1e-2)))
    before, x = settings_of(model), randn(2, 4)
    with solver_settings(model, solver="rk4", steps=64):
        assert all((b["solver"], b["steps"]) == ("rk4", 64) for b in settings_of(model))
        expected = model[1][0].branch.flow(model[0].branch.flow(x, 1.0), 1.0)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert settings_of(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_solver_settings_are_restored_after_an_error(error):
    model = nn.Sequential(ODEBlock(Linear(), "euler", 3), ODEBlock(Linear(), "dopri5", rtol=1e-2))
    before = settings_of(model)
    with pytest.raises(error), solver_settings(model, solver="rk4", steps=64):
        raise error
    assert settings_of(model) == before
    with pytest.raises(InvalidInput), solver_settings(model, solver="rk4", steps=0, rtol=None, atol=None):
        model(randn(2, 4))
    assert settings_of(model) == before


def test_solver_settings_nest():
    block = ODEBlock(Linear(), "euler", 3)
    with solver_settings(block, steps=5):
        with solver_settings(block, solver="heun"):
            assert (block.solver, block.steps) == ("heun", 5)
        assert (block.solver, block.steps) == ("euler", 5)
    assert (block.solver, block.steps) == ("euler", 3)


EXACT = {"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}
KINDS = {
    "fixed": {"solver": "rk4", "steps": 64},
    "pair on a grid": {"solver": "dopri5", "steps": 16},
    "adaptive": {**EXACT, "first_step": 0.1, "min_step": 1e-6, "error_norm": "sample", "max_steps": 500},
    "multistep": {"solver": "explicit_adams", "steps": 64},
}


@pytest.mark.parametrize("later", KINDS)
@pytest.mark.parametrize("trained", KINDS)
def test_solver_settings_go_from_any_kind_of_solve_to_any_other_and_back(trained, later):
    block, x = ODEBlock(Linear(), **KINDS[trained]), randn(2, 4)
    before, out = settings_of(block), block(x)
    with solver_settings(block, **KINDS[later]):
        torch.testing.assert_close(block(x), block.branch.flow(x, 1.0), rtol=1e-4, atol=1e-4)
        assert {name: getattr(block, name) for name in KINDS[later]} == KINDS[later]
        assert (block.grid_steps is None) is (later == "adaptive")
    assert settings_of(block) == before
    assert torch.equal(block(x), out)


def test_a_solver_that_is_named_alone_chooses_its_steps_as_a_new_block_does():
    fixed, adaptive = ODEBlock(Linear(), "rk4", steps=3), ODEBlock(Linear(), **EXACT)
    with solver_settings(fixed, solver="tsit5"):
        assert (fixed.grid_steps, fixed.steps) == (None, None)
    with solver_settings(adaptive, solver="heun"):
        assert (adaptive.grid_steps, adaptive.rtol) == (8, None)
    with solver_settings(adaptive, solver="bosh3"):
        assert (adaptive.grid_steps, adaptive.rtol, adaptive.atol) == (None, 1e-8, 1e-8)
    with solver_settings(adaptive, steps=5):
        assert (adaptive.grid_steps, adaptive.solver, adaptive.rtol) == (5, "dopri5", None)
    with solver_settings(fixed, steps=5):
        assert (fixed.grid_steps, fixed.solver) == (5, "rk4")


@pytest.mark.parametrize("name", ["t0", "branch", "tolerance"])
def test_an_unknown_setting_is_refused_before_anything_changes(name):
    block = ODEBlock(Linear(), "euler", 3)
    with (
        pytest.raises(InvalidInput, match=f"'{name}': choose from solver, steps, rtol, atol, gradient"),
        solver_settings(block, steps=5, **{name: 1}),
    ):
        pass
    assert block.steps == 3


def test_tolerances_default_to_a_thousandth():
    x, costs = randn(2, 4), []
    for settings in ({}, {"rtol": 1e-3}, {"rtol": 1e-3, "atol": 1e-3}, {"rtol": 1e-9, "atol": 1e-9}):
        block = ODEBlock(Linear(), "dopri5", **settings)
        block(x)
        costs.append(block.stats.nfe_forward)
    assert costs[0] == costs[1] == costs[2] < costs[3]


def test_a_failed_solve_is_an_error_of_its_kind():
    class Explodes(nn.Module):
        def forward(self, t, h):
            return h**2

    with pytest.raises(SolverError):
        ODEBlock(Explodes(), "dopri5", t1=5.0)(torch.ones(1, 1))
    with pytest.raises(ArithmeticError):
        ODEBlock(Explodes(), "dopri5", t1=5.0)(torch.ones(1, 1))
