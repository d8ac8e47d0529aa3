"""Figures of nets that differ in depth show the numbers they were given."""

import math

import pytest

from resode import plots


def power(mean, local=None):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 2, "local": local or [mean, mean]}


def table(beta=0.5, weights="iid", norm="none", exponent=None, verdict="non-trivial limit", factor=1.0):
    growths = [
        {"depth": depth, "seed": seed, "change": factor * (seed + 1), "gradient_change": 3.0}
        for seed in (0, 1)
        for depth in (2, 8)
    ]
    stage = {"beta": beta, "weights": weights, "norm": norm}
    return {"stage": stage, "growths": growths, "exponents": {"change": exponent or power(0.0)}, "verdict": verdict}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_growth_draws_geometric_means_of_states_and_gradients_with_the_exponent():
    (axes,) = plots.growth([table(exponent=power(-0.004))]).axes
    states, gradients = axes.lines
    assert list(states.get_xdata()) == list(gradients.get_xdata()) == [2, 8]
    assert list(states.get_ydata()) == pytest.approx([math.sqrt(2)] * 2)
    assert list(gradients.get_ydata()) == pytest.approx([3.0] * 2)
    assert (states.get_linestyle(), gradients.get_linestyle()) == ("-", "--")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert legend(axes) == ["$\\beta$ = 0.5: p = 0.00 ± 0.10"], "no minus before 0"


def test_growth_has_a_panel_for_each_norm_and_weights_and_none_for_skipinit():
    tables = [table(norm=n, weights=w) for n in ("batch", "none") for w in ("tied", "iid", "smooth")]
    figure = plots.growth([*tables, table(beta="skipinit")])
    assert [axes.get_title() for axes in figure.axes[:3]] == list(plots.scaling.WEIGHTS.values())
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes[::3]] == ["no norm", "batch norm"]
    assert all(len(axes.lines) == 2 for axes in figure.axes)


def test_growth_says_so_where_an_explosion_follows_no_power():
    faster = table(exponent=power(5.0, [2.0, 9.0]), verdict="explosion")
    assert legend(plots.growth([faster]).axes[0]) == ["$\\beta$ = 0.5: faster than any power"]
    steady = table(exponent=power(0.5), verdict="explosion")
    assert legend(plots.growth([steady]).axes[0]) == ["$\\beta$ = 0.5: p = 0.50 ± 0.10"]


def test_growth_leaves_out_what_a_logarithm_has_no_place_for():
    found = table()
    found["growths"][1]["change"] = None
    found["growths"][3]["change"] = math.inf
    (axes,) = plots.growth([found]).axes
    assert list(axes.lines[0].get_xdata()) == [2]


def training(blocks, seed, diverged=None):
    whole = {
        "scores": {"test": {"accuracy": 0.9 - 0.1 * seed}},
        "after": {"relative_increment": 1 / blocks, "roughness": 2 / blocks},
        "update": {"coherence": 0.5},
    }
    none = {"scores": None, "after": None, "update": None}
    return {"blocks": blocks, "seed": seed, "diverged": diverged, **(none if diverged else whole)}


def case(beta="0.5", optimizer="sgd", diverged=()):
    trainings = [training(b, s, "the loss became nan" if b in diverged else None) for s in (0, 1) for b in (2, 4)]
    fits = [{"quantity": name, **power(-1.0)} for name in ("roughness", "relative_increment")]
    return {
        "beta": beta,
        "weights": "iid",
        "optimizer": optimizer,
        "trainings": trainings,
        "after": None if diverged else {"fits": fits},
        "update": None if diverged else {"coherence": power(-0.3)},
    }


def test_trained_by_depth_draws_seeds_means_and_exponents():
    error, increment, roughness, coherence = plots.trained_by_depth([case()]).axes
    points, mean, crosses = error.lines
    assert sorted(points.get_ydata()) == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert list(mean.get_ydata()) == pytest.approx([0.15, 0.15])
    assert list(mean.get_xdata()) == [2, 4]
    assert not len(crosses.get_xdata())
    assert list(increment.lines[1].get_ydata()) == [0.5, 0.25]
    assert list(roughness.lines[1].get_ydata()) == [1.0, 0.5]
    assert list(coherence.lines[1].get_ydata()) == [0.5, 0.5]
    assert legend(increment) == legend(roughness) == ["p = −1.00 ± 0.10"]
    assert legend(coherence) == ["p = −0.30 ± 0.10"]
    assert error.get_legend() is None
    slopes = [line.get_ydata() for line in increment.lines if line.get_linestyle() == ":"]
    assert [y[1] / y[0] for y in slopes] == pytest.approx([2**-0.5, 2**-1.0])


def test_trained_by_depth_marks_the_depths_that_diverged():
    for axes in plots.trained_by_depth([case(diverged=(4,))]).axes:
        assert list(axes.lines[1].get_xdata()) == [2]
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"] == [[4]]
    (keys,) = plots.trained_by_depth([case(diverged=(4,))]).legends
    assert [text.get_text() for text in keys.get_texts()] == ["$\\beta$ = 0.5, iid", "some seed diverged"]


def test_trained_by_depth_has_a_row_an_optimizer_and_a_colour_a_case():
    figure = plots.trained_by_depth([case(), case("skipinit"), case("skipinit", "adamw")])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sgd"] * 4 + ["adamw"] * 4
    (keys,) = figure.legends
    assert [text.get_text() for text in keys.get_texts()] == ["$\\beta$ = 0.5, iid", "SkipInit"]
    _, first, _, _, second, *_ = figure.axes[0].lines
    assert first.get_color() != second.get_color() == figure.axes[4].lines[1].get_color()


def degraded(depth, seeds):
    errors = [
        {"diverged": None, "train_error": [0.8, 0.2 * s], "test_error": [0.9, 0.4 * s], "seed": s} for s in range(seeds)
    ]
    return {"depth": depth, "seeds": errors}


def test_degradation_draws_the_mean_errors_of_every_epoch():
    nets = {"Plain": {"depths": [degraded(8, 2), degraded(14, 2)]}, "Residual": {"depths": [degraded(8, 1)]}}
    plain, residual = plots.degradation(nets).axes
    test, train = plain.lines[:2]
    assert list(test.get_xdata()) == [1, 2]
    assert list(test.get_ydata()) == pytest.approx([0.9, 0.2])
    assert list(train.get_ydata()) == pytest.approx([0.8, 0.1])
    assert (test.get_linestyle(), train.get_linestyle()) == ("-", "--")
    assert test.get_color() == train.get_color() != plain.lines[2].get_color()
    assert legend(plain) == ["depth 8", "depth 14"]
    assert legend(residual) == ["depth 8"]


@pytest.mark.parametrize(("last", "scale"), [(0.02, "log"), (0.5, "linear"), (0.0, "linear")])
def test_degradation_shows_small_errors_beside_large_ones(last, scale):
    row = {"depth": 8, "seeds": [{"diverged": None, "train_error": [0.9, last], "test_error": [0.8, last], "seed": 0}]}
    for axes in plots.degradation({"Plain": {"depths": [row]}, "Residual": {"depths": [row]}}).axes:
        assert axes.get_yscale() == scale
        low, high = axes.get_ylim()
        assert low <= last < high == 1.0


def test_degradation_leaves_out_seeds_that_diverged():
    row = degraded(8, 2)
    row["seeds"][1] |= {"diverged": "the loss became nan", "train_error": [0.9], "test_error": [0.9]}
    (axes,) = plots.degradation({"Plain": {"depths": [row]}}).axes
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.0]


@pytest.mark.parametrize(
    "figure",
    [
        plots.growth([table()]),
        plots.trained_by_depth([case(), case(optimizer="adamw")]),
        plots.degradation({"Plain": {"depths": [degraded(8, 2)]}}),
    ],
)
def test_nothing_reaches_beyond_the_edge(figure):
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= figure.bbox.x0 - 1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y0 >= figure.bbox.y0 - 1
        assert box.y1 <= figure.bbox.y1 + 1
