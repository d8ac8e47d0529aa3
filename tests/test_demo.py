"""The demo, in a small form: one folder, one report that stands alone."""

import re

import pytest

from resode.demo import Demo, demo, gradient_warnings
from resode.errors import RunError
from resode.nets import Architecture
from resode.train import Recipe

NETS = {
    "residual net": Architecture(net="resnet", depth=8, width=4, kind="preact"),
    "plain net": Architecture(net="plain", depth=8, width=4),
    "ODE net": Architecture(net="odenet", width=4, kind="preact", solver="rk4", steps=2),
}
SETTINGS = Demo(seeds=(0, 1), architectures=NETS, recipe=Recipe(epochs=1, batch_size=256))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, demo(SETTINGS, out, progress=False)


def test_the_report_stands_alone_with_all_it_promises(made):
    out, paths = made
    report = (out / "report.html").read_text()
    assert paths[0] == out / "report.html"
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', report)) == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', report), "nothing is fetched from elsewhere"
    assert report.count("<figcaption>") == 3
    for head in ("training accuracy", "test accuracy", "parameters", "NFE", "time"):
        assert f"<th>{head}</th>" in report
    for net in NETS:
        assert f"<td>{net}</td>" in report
    for path in paths[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in paths[1:]} == {"training", "lesions", "convergence"}


def test_the_report_says_so_when_the_plain_net_is_not_degraded(made):
    """Eight layers train well without shortcuts, as far as one epoch goes."""
    out, _ = made
    assert "No clear degradation" in (out / "report.html").read_text()


def test_every_number_of_the_table_is_that_of_the_trainings(made):
    import json

    out, _ = made
    results = json.loads((out / "results" / "trainings.json").read_text())
    report = (out / "report.html").read_text()
    for net, found in results.items():
        assert len(found) == 2
        assert f"{found[0]['parameters']:,}" in report
        mean = sum(one["test"]["accuracy"] for one in found) / 2
        assert f"{mean:.1%} ±" in report, net


def test_the_report_warns_of_gradients_that_are_off(made):
    out, _ = made
    assert "adjoint gradient" not in (out / "report.html").read_text(), "the demo's own are exact"

    def result(error):
        block = {"parameter": "branch.weight", "relative_error": error, "reconstruction_error": 0.02}
        return {"gradient_fidelity": {"start": {"stages.0.0": block}, "end": {"stages.0.0": block}}}

    (said,) = gradient_warnings({"residual net": [{}, {}], "ODE net": [result(0.001), result(0.3)]})
    for words in ("1 of 2 seeds", "the trained ODE net", "off by 30.0%", "gradient=checkpoint"):
        assert words in said
    assert gradient_warnings({"residual net": [{}], "ODE net": [result(0.001)]}) == []


def test_the_report_of_an_ode_net_trained_by_the_adjoint_has_the_warning(tmp_path):
    nets = {**NETS, "ODE net": Architecture(net="odenet", width=4, solver="euler", steps=1, gradient="adjoint")}
    settings = Demo(seeds=(0,), architectures=nets, recipe=Recipe(epochs=1, batch_size=512))
    report, *_ = demo(settings, tmp_path / "run", progress=False)
    assert "The adjoint gradient of the trained ODE net is off by" in report.read_text()


def test_a_second_demo_starts_at_once_and_changes_nothing(made):
    out, paths = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.p*")}
    assert demo(SETTINGS, out, progress=False) == paths
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.p*")}


def test_the_folder_of_another_demo_is_refused(made):
    out, _ = made
    with pytest.raises(RunError, match="seeds"):
        demo(Demo(seeds=(3,), architectures=NETS, recipe=SETTINGS.recipe), out, progress=False)


def test_the_default_demo_compares_like_with_like():
    """One depth for the residual and the plain net, one stack, recipe and branch kind for all."""
    nets = Demo().architectures
    assert nets["residual net"].depth == nets["plain net"].depth
    assert nets["residual net"].width == nets["plain net"].width == nets["ODE net"].width
    assert nets["residual net"].kind == nets["ODE net"].kind
    assert len(Demo().seeds) == 3
