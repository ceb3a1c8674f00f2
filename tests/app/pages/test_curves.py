"""The data of learning curves: every column that changes is in one chart, and the page stays small."""

from __future__ import annotations

import json
import math

import pytest

from lightkit.app.pages import curves
from lightkit.app.pages.curves import RunCurves, curves_data, curves_html


def run(tmp_path, text, name="a", **options):
    path = tmp_path / f"{name}.csv"
    path.write_text(text)
    return RunCurves(name, path, **options)


LOG = (
    "epoch,step,train/loss_step,train/loss_epoch,val/loss,train/accuracy,val/accuracy,lr-Adam,test/loss\n"
    "0,0,3,,,,,0.1,\n0,1,2,2.5,2.2,0.5,0.6,0.1,\n1,2,nan,,,,,0.2,\n1,3,1,1.5,1.2,0.7,0.8,0.2,\n2,4,0.5,,,,,,9\n"
)


def test_charts(tmp_path):
    """Training and validation of one metric share a chart; the loss and the accuracy come first."""
    data = curves_data([run(tmp_path, LOG)])
    assert [chart["name"] for chart in data["charts"]] == ["loss", "accuracy", "lr-Adam"]
    loss, accuracy, _ = data["charts"]
    assert loss["kinds"] == ["training, each step", "validation", "training, mean of the epoch"]
    assert loss["quiet"] == ["training, mean of the epoch"] and accuracy["quiet"] == []
    assert accuracy["kinds"] == ["training", "validation"]
    (steps,) = [line for line in loss["lines"] if line["kind"] == "training, each step"]
    assert steps["x"] == [0, 1, 2, 3, 4] and steps["y"] == [3, 2, None, 1, 0.5]
    # The last epoch has one step of two.
    assert data["runs"][0]["steps_per_epoch"] == 2
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize("text", ["", "step\n", "epoch,step,x\n0,0,1\n", "\x00", "step,x\n1,a\n2,b\n", "step,x\n1,2"])
def test_nothing_to_draw(tmp_path, text):
    """A log without a curve of two points gives no charts, and no error."""
    assert curves_data([run(tmp_path, text)]) is None
    assert curves_data([RunCurves("missing", tmp_path / "none.csv")]) is None


def test_long_logs(tmp_path):
    """Of a long log the extremes stay, so that a spike does not vanish."""
    rows = "".join(f"{i},{1000 if i == 54_321 else math.sin(i)}\n" for i in range(100_000))
    (line,) = curves_data([run(tmp_path, "step,x\n" + rows, max_points=300)])["charts"][0]["lines"]
    assert len(line["x"]) <= 300 and max(line["y"]) == 1000 and line["x"] == sorted(line["x"])
    assert line["x"][line["y"].index(1000)] == 54_321


def test_several_runs(tmp_path):
    """The curves of several runs share the charts, each under its own name."""
    data = curves_data(
        [run(tmp_path, LOG), run(tmp_path, "step,val/loss\n0,1\n9,2\n", "<b>", note="x", is_shown=False)]
    )
    assert [(r["name"], r["note"], r["shown"]) for r in data["runs"]] == [("a", "", True), ("<b>", "x", False)]
    assert [line["run"] for line in data["charts"][0]["lines"]].count(1) == 1


def test_without_the_library(tmp_path, monkeypatch):
    """Where d3 is not installed the page has the picture instead."""
    monkeypatch.setattr(curves, "plotting_library", lambda: None)
    assert curves_html(curves_data([run(tmp_path, LOG)]), "<img>") == "<img>"
