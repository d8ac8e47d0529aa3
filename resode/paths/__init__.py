"""The network as an ensemble of paths."""

from resode.paths import interventions, lengths, lesion, spectrum
from resode.paths.interventions import applied, delete, noise, only, permute, scale, swap

__all__ = [
    "applied",
    "delete",
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
