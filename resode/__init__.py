"""resode: residual dynamics. A residual branch f(t, h) is written once and run at any depth.

As the blocks of a ResNet, h ← h + f(t_l, h), or as the vector field of an ODE, dh/dt = f(t, h); with one stack of
normalization, dropout and augmentation, one trainer, and one set of analyses.
"""

from resode import data, limits, paths, train
from resode.blocks import (
    Branch,
    ODEBlock,
    ResidualBlock,
    collect_penalties,
    convert,
    gradient_fidelity,
    solver_settings,
)
from resode.dynamics import Parts, ResidualDynamics, Step, dynamics
from resode.dynamics.inference import inference
from resode.errors import InvalidInput, ResodeError, RunError, SolverError, TrainingError
from resode.layers.context import evaluate, interval_time
from resode.nets import NetConfig, build
from resode.runs import Run
from resode.stack import Dropout, Stack
from resode.train import Recipe, fit, recalibrate

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "Dropout",
    "InvalidInput",
    "NetConfig",
    "ODEBlock",
    "Parts",
    "Recipe",
    "ResidualBlock",
    "ResidualDynamics",
    "ResodeError",
    "Run",
    "RunError",
    "SolverError",
    "Stack",
    "Step",
    "TrainingError",
    "build",
    "collect_penalties",
    "convert",
    "data",
    "dynamics",
    "evaluate",
    "fit",
    "gradient_fidelity",
    "inference",
    "interval_time",
    "limits",
    "paths",
    "recalibrate",
    "solver_settings",
    "train",
]
