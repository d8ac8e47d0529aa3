"""The network as its depth goes to infinity."""

from resode.limits.certificate import Certificate, certificate
from resode.limits.convergence import ConvergenceTable, convergence
from resode.limits.discretize import discretize
from resode.limits.distance import distance
from resode.limits.identity_bias import identity_bias
from resode.limits.lift import lift
from resode.limits.lyapunov import lyapunov
from resode.limits.reconstruction import reconstruction
from resode.limits.regime import regime
from resode.limits.regularity import regularity
from resode.limits.scaling import ScalingTable, scaling
from resode.limits.signal import signal
from resode.limits.swap import swap
from resode.nets.refine import coarsen, coarsen_, refine, refine_
from resode.train.refinement import Refine

__all__ = [
    "Certificate",
    "ConvergenceTable",
    "Refine",
    "ScalingTable",
    "certificate",
    "coarsen",
    "coarsen_",
    "convergence",
    "discretize",
    "distance",
    "identity_bias",
    "lift",
    "lyapunov",
    "reconstruction",
    "refine",
    "refine_",
    "regime",
    "regularity",
    "scaling",
    "signal",
    "swap",
]
