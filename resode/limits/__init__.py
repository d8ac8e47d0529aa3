"""The network as its depth goes to infinity."""

from resode.limits.convergence import ConvergenceTable, convergence

__all__ = ["ConvergenceTable", "convergence"]
