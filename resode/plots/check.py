"""A batch as an untrained net sees it: the inputs, the outputs of its layers, the gradients of its weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from resode.plots.frame import COLOURS, tidy, whole_numbers

ROWS = 4
"""Rows of images."""


def check(picture: Mapping[str, Any]) -> Figure:
    """The picture of ``resode check``: images with their labels; histograms of outputs; gradients beside weights.

    Args:
        picture: ``picture`` of a report of ``train.check``: ``inputs`` are images (N, C, H, W) in 0 … 255 or points
            (N, 2), ``labels`` their classes; ``outputs`` holds ``shares``, of each layer, between two ``edges``;
            ``gradients`` the ``norm`` of each weight's gradient and that of the ``weight``.
    """
    figure = Figure(figsize=(11.0, 3.8), layout="constrained", dpi=150)
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.7))
    inputs, labels = picture["inputs"], picture["labels"]
    if isinstance(inputs[0][0], Sequence):
        _images(left, inputs, labels)
    else:
        _points(left.subplots(), inputs, labels)
    outputs, gradients = right.subplots(1, 2)
    _outputs(outputs, picture["outputs"], picture["edges"])
    _gradients(gradients, picture["gradients"])
    return figure


def _images(figure: SubFigure, images: Sequence[Any], labels: Sequence[int]) -> None:
    rows = min(ROWS, len(images))
    panels = figure.subplots(rows, math.ceil(len(images) / rows), squeeze=False).flat
    for axes in panels:
        axes.set_axis_off()
    for axes, image, label in zip(figure.axes, images, labels, strict=False):
        if len(image) == 3:  # from (C, H, W) to (H, W, C)
            axes.imshow([list(zip(*rows, strict=True)) for rows in zip(*image, strict=True)])
        else:
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        axes.set_title(str(label), fontsize=7, pad=2)


def _points(axes: Axes, points: Sequence[Sequence[float]], labels: Sequence[int]) -> None:
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    axes.scatter([p[0] for p in points], [p[1] for p in points], c=colours, s=14)
    axes.set_xlabel("$x_1$")
    axes.set_ylabel("$x_2$")
    tidy(axes)


def _outputs(axes: Axes, layers: Sequence[Mapping[str, Any]], edges: Sequence[float]) -> None:
    """A column a layer: the darker, the more of its outputs have that value (the outermost rows hold all beyond)."""
    axes.set_title("outputs of the layers", fontsize=9, loc="left")
    axes.set_xlabel("convolution or linear layer")
    axes.set_ylabel("value (darker: more frequent)")
    if not layers:
        return
    peaks = [max(layer["shares"]) for layer in layers]
    columns = [[share / peak for share in layer["shares"]] for layer, peak in zip(layers, peaks, strict=True)]
    places = [i + 0.5 for i in range(len(layers) + 1)]
    axes.pcolormesh(places, edges, list(zip(*columns, strict=True)), cmap="Blues", vmin=0.0, vmax=1.0, rasterized=True)
    whole_numbers(axes.xaxis)


def _gradients(axes: Axes, weights: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("gradients of the weights", fontsize=9, loc="left")
    places = range(1, len(weights) + 1)
    for key, label, marker in (("weight", "weight", "s"), ("norm", "gradient", "o")):
        colour = COLOURS[0] if key == "norm" else "#bbbbbb"
        values = [w[key] if w[key] and math.isfinite(w[key]) and w[key] > 0 else math.nan for w in weights]
        axes.plot(places, values, marker=marker, markersize=3, linewidth=1.0, color=colour, label=label)
    for place, weight in zip(places, weights, strict=True):
        if not weight["norm"]:  # 0, or (as JSON has what is not finite) None
            axes.axvline(place, color=COLOURS[1], linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("weight")
    axes.set_ylabel("norm (dotted: no gradient)")
    whole_numbers(axes.xaxis)
    tidy(axes)
    if weights:
        axes.legend(frameon=False, fontsize=8)
