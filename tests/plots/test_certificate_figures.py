"""The picture of a certificate shows its numbers, and does without those that are not there."""

import math

import pytest
from matplotlib.figure import Figure

from resode import plots
from resode.report import png


def solved(solver, factor, error, accuracy=0.9):
    return {"solver": solver, "factor": factor, "error": error, "accuracy": accuracy}


SWAP = {
    "reference": solved("rk4", 5.0, 0.0, 0.95),
    "evaluations": [
        solved("as trained", 1.0, 0.02),
        solved("as trained", 0.5, 0.2, 0.5),
        solved("as trained", 2.0, 0.005),
        solved("euler", 1.0, math.inf),
    ],
    "rounding": 1e-6,
    "critical": 1.0,
}
RECONSTRUCTION = {
    "factors": [1.0, 2.0, 4.0],
    "blocks": [{"name": "0", "errors": [0.1, 0.01, None], "rounding": 1e-7}],
}
DISTANCE = {
    "blocks": [
        {"name": "0", "times": [0.0, 0.5, 1.0], "relative": [0.0, 0.01, 0.02], "states": [1.0, 2.0, 4.0],
         "bound": [0.0, 1.0, 8.0]},
        {"name": "1", "times": [0.0, 1.0], "relative": [0.0, 0.03], "states": [1.0, 1.0], "bound": None},
    ]
}  # fmt: skip
STRETCHES = [
    {"stage": 0, "depth": 2, "increments": [0.5, 0.4], "states": [1.0, 2.0, 2.0], "weights": [2.0, 2.0],
     "differences": [1.0]},
    {"stage": 1, "depth": 1, "increments": [0.3], "states": [1.0, 1.0], "weights": None, "differences": None},
]  # fmt: skip
BIAS = {
    "steps": [
        {"stage": 0, "position": 1, "branch": 1.0, "shortcut": 1.0},
        {"stage": 0, "position": 0, "branch": 1.0, "shortcut": 3.0},
        {"stage": 1, "position": 1, "branch": 0.0, "shortcut": 0.0},
        {"stage": 1, "position": 2, "branch": 0.0, "shortcut": 1.0},
    ]
}
FOUND = {
    "verdict": {"words": "Not near an ODE: because.", "far": 0.1},
    "swap": SWAP,
    "reconstruction": RECONSTRUCTION,
    "regularity": {"stretches": STRETCHES},
    "distance": DISTANCE,
    "bias": BIAS,
    "initial_bias": None,
    "signal": {
        "states": [1.0, 2.0, 4.0],
        "gradients": [0.4, 0.2, 0.1],
        "steps": [{"index": 0, "shortcut": 2.0, "branch": 1.0}, {"index": 1, "shortcut": 0.0, "branch": 1.0}],
    },
    "lyapunov": {"stretches": [{"depth": 2, "exponents": [1.0, 0.5], "deviations": [0.1, 0.2]}]},
    "missing": [],
}


def curves(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_every_part_is_drawn():
    figure = plots.certificate(FOUND, "net")
    error, accuracy, back, rough, away, bias, signal, rates = figure.axes
    assert curves(error)["as trained"] == [0.2, 0.02, 0.005]
    assert curves(error)["euler"] == [], "infinite errors are not drawn"
    assert curves(error)["far"] == [0.1, 0.1]
    assert list(accuracy.lines[0].get_ydata()) == [0.5, 0.9, 0.9]
    assert curves(accuracy)["reference"] == [0.95, 0.95]
    assert curves(back)["0"] == [0.1, 0.01]
    assert curves(away)["0"] == [0.01, 0.02]
    assert [list(line.get_ydata()) for line in away.lines if line.get_linestyle() == "--"] == [[0.5, 2.0], []]
    assert curves(rough)["‖Δh‖/‖h‖"] == [0.5, 0.2]
    assert curves(rough)["‖ΔW‖/‖W‖"] == [0.5]
    assert curves(bias)["as it is"] == [0.5, 0.0]
    assert curves(signal)["‖h‖/max"] == [0.25, 0.5, 1.0]
    assert curves(signal)["gradient by branch/by shortcut"] == [0.5]
    assert list(rates.lines[0].get_ydata()) == [1.0, 0.5]
    assert figure.get_suptitle() == "net: Not near an ODE: because."


def test_what_is_missing_is_said_instead():
    missing = [["swap", "it cannot be lifted"], ["distance", "it cannot be lifted"], ["reconstruction", "no inverse"]]
    found = {**FOUND, "swap": None, "distance": None, "reconstruction": None, "missing": missing}
    texts = [[text.get_text() for text in axes.texts] for axes in plots.certificate(found).axes]
    assert texts[:3] + texts[4:5] == [["it cannot be lifted"]] * 2 + [["no inverse"], ["it cannot be lifted"]]


REGIME = {
    "stretches": [
        {
            "stage": 0,
            "regime": "diffusive",
            "depths": [4, 8, 16],
            "fits": [
                {"quantity": "relative_increment", "mean": -0.5, "low": -0.6, "high": -0.4,
                 "values": [[0.5, 0.35, 0.25], [0.5, 0.36, 0.25]]},
                {"quantity": "length", "mean": 0.5, "low": 0.4, "high": 0.6, "values": [[2.0, 2.8, 4.0]]},
            ],
        }
    ]
}  # fmt: skip


def test_a_regime_shows_values_and_lines_of_their_slope():
    (axes,) = plots.regime(REGIME).axes
    first, second, line = (list(line.get_ydata()) for line in axes.lines)
    assert (first, second) == ([0.5, 0.35, 0.25], [0.5, 0.36, 0.25])
    assert line[0] / line[2] == pytest.approx(2.0)
    assert axes.get_title(loc="left") == "stage 1: diffusive"
    assert len(plots.regime(REGIME, ("relative_increment", "length")).axes[0].lines) == 5


@pytest.mark.parametrize("figure", [plots.certificate(FOUND), plots.regime(REGIME)])
def test_nothing_reaches_beyond_the_edge_of_a_picture(figure: Figure):
    png(figure)
    page = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= page.y1 + 1
