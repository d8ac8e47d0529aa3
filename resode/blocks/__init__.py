"""A residual branch, and the two ways to run it: as a residual block, or as the vector field of an ODE block."""

from resode.blocks.branch import KINDS, POST_ACTIVATION, TIMES, Branch
from resode.blocks.compiled import COMPILE_MODES, begin_graphs
from resode.blocks.fidelity import FIDELITY_TOLERANCE, Agreement, Fidelity, gradient_fidelity
from resode.blocks.foreign import convert, refuse_foreign
from resode.blocks.ode import ODEBlock, ode_blocks, solver_settings
from resode.blocks.projected import ProjectedODE
from resode.blocks.residual import (
    SCALES,
    SHORTCUTS,
    PadShortcut,
    ProjectionShortcut,
    ResidualBlock,
    make_scale,
    make_shortcut,
)
from resode.blocks.settings import GRADIENTS, SOLVERS, check_solver
from resode.blocks.solvers import SolveStats
from resode.blocks.synchronized import synchronize
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX, Tableau
from resode.blocks.transport import collect_penalties

__all__ = [
    "ADAPTIVE",
    "COMPILE_MODES",
    "FIDELITY_TOLERANCE",
    "GRADIENTS",
    "KINDS",
    "POST_ACTIVATION",
    "SCALES",
    "SHORTCUTS",
    "SOLVERS",
    "TABLEAUX",
    "TIMES",
    "Agreement",
    "Branch",
    "Fidelity",
    "ODEBlock",
    "PadShortcut",
    "ProjectedODE",
    "ProjectionShortcut",
    "ResidualBlock",
    "SolveStats",
    "Tableau",
    "begin_graphs",
    "check_solver",
    "collect_penalties",
    "convert",
    "gradient_fidelity",
    "make_scale",
    "make_shortcut",
    "ode_blocks",
    "refuse_foreign",
    "solver_settings",
    "synchronize",
]
