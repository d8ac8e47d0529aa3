"""The network as its depth goes to infinity."""

from resode.limits.convergence import ConvergenceTable, convergence
from resode.limits.scaling import ScalingTable, scaling

__all__ = ["ConvergenceTable", "ScalingTable", "convergence", "scaling"]
