"""Training: the recipe, the loop, what is measured, and the session that ties them to a run folder."""

from resode.train.loop import fit
from resode.train.metrics import Metrics, evaluate, nfe
from resode.train.recalibrate import recalibrate
from resode.train.recipe import Recipe
from resode.train.refinement import Refine
from resode.train.sampled import SampledSteps
from resode.train.session import Data, Setup, Trained, check_device, load, train

__all__ = [
    "Data",
    "Metrics",
    "Recipe",
    "Refine",
    "SampledSteps",
    "Setup",
    "Trained",
    "check_device",
    "evaluate",
    "fit",
    "load",
    "nfe",
    "recalibrate",
    "train",
]
