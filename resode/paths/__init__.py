"""The network as an ensemble of paths."""

from resode.paths import lesion

__all__ = ["lesion"]
