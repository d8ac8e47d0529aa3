"""The network as an ensemble of paths."""

from resode.paths import interventions, lesion
from resode.paths.interventions import applied, delete, noise, only, permute, scale, swap

__all__ = ["applied", "delete", "interventions", "lesion", "noise", "only", "permute", "scale", "swap"]
