"""The network as an ensemble of paths (Veit, Wilber & Belongie 2016, arXiv 1605.06431).

``lesion`` measures a network without some of its steps, or with them in another order; ``interventions`` are the words
for such changes. ``spectrum`` sorts its gradient by the lengths of paths, exactly; ``lengths`` counts paths.
``ensemble`` averages sub-networks. All of them act on a view that :func:`resode.dynamics` gives of any residual
network.
"""

from resode.paths import ensemble, interventions, lengths, lesion, spectrum
from resode.paths.interventions import applied, delete, noise, only, permute, scale, swap

__all__ = [
    "applied",
    "delete",
    "ensemble",
    "interventions",
    "lengths",
    "lesion",
    "noise",
    "only",
    "permute",
    "scale",
    "spectrum",
    "swap",
]
