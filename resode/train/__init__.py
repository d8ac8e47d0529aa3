"""Training: the recipe, the loop, what is measured, and the session that ties them to a run folder."""

from resode.train.averaging import Average
from resode.train.calibration import expected_calibration_error
from resode.train.check import check
from resode.train.clipping import adaptive_clip_
from resode.train.dropout_epochs import DropoutEpochs
from resode.train.frozen import FreezeNorm, freeze, unfreeze
from resode.train.loop import fit
from resode.train.metrics import Metrics, evaluate, nfe
from resode.train.montecarlo import monte_carlo
from resode.train.penalties import Penalties
from resode.train.presets import PRESETS, preset
from resode.train.recalibrate import recalibrate
from resode.train.recipe import Recipe
from resode.train.refinement import Refine
from resode.train.sampled import SampledSteps
from resode.train.session import Data, Setup, Trained, check_device, load, train
from resode.train.smoothness import smoothness
from resode.train.sparsity import factorize, multiply_out, prune_to_sparse

__all__ = [
    "PRESETS",
    "Average",
    "Data",
    "DropoutEpochs",
    "FreezeNorm",
    "Metrics",
    "Penalties",
    "Recipe",
    "Refine",
    "SampledSteps",
    "Setup",
    "Trained",
    "adaptive_clip_",
    "check",
    "check_device",
    "evaluate",
    "expected_calibration_error",
    "factorize",
    "fit",
    "freeze",
    "load",
    "monte_carlo",
    "multiply_out",
    "nfe",
    "preset",
    "prune_to_sparse",
    "recalibrate",
    "smoothness",
    "train",
    "unfreeze",
]
