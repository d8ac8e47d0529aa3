"""The parts of a branch: normalizations, dropouts, convolutions, and the context of a solve."""

from resode.layers.basis import BASES, Basis
from resode.layers.context import SolveContext, current, evaluate, interval_time
from resode.layers.conv import Conv2d, Linear, activation_gain, standardize_weight, time_map
from resode.layers.dropout import DROPOUTS, Dropout, cutout_mask, dropout
from resode.layers.modulation import FiLM, LayerScale
from resode.layers.noise import GaussianNoise
from resode.layers.norm import (
    NORMS,
    BatchNorm,
    InstanceNorm,
    LayerNorm,
    PixelNorm,
    layer_norm,
    make_norm,
    pixel_norm,
)

__all__ = [
    "BASES",
    "DROPOUTS",
    "NORMS",
    "Basis",
    "BatchNorm",
    "Conv2d",
    "Dropout",
    "FiLM",
    "GaussianNoise",
    "InstanceNorm",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "PixelNorm",
    "SolveContext",
    "activation_gain",
    "current",
    "cutout_mask",
    "dropout",
    "evaluate",
    "interval_time",
    "layer_norm",
    "make_norm",
    "pixel_norm",
    "standardize_weight",
    "time_map",
]
