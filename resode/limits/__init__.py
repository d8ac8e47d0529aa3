"""The network as its depth goes to infinity."""

from resode.limits.convergence import ConvergenceTable, convergence
from resode.limits.discretize import discretize
from resode.limits.lift import lift
from resode.limits.scaling import ScalingTable, scaling
from resode.nets.refine import coarsen, coarsen_, refine, refine_
from resode.train.refinement import Refine

__all__ = [
    "ConvergenceTable",
    "Refine",
    "ScalingTable",
    "coarsen",
    "coarsen_",
    "convergence",
    "discretize",
    "lift",
    "refine",
    "refine_",
    "scaling",
]
