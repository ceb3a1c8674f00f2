"""Whole forecast jobs on the command line."""

from __future__ import annotations

import csv
import json
import math

import pytest
from support.commands import run
from support.series import write_wave

from lightkit.app import prediction
from lightkit.app.restore import restore
from lightkit.errors import LightkitError

pytestmark = pytest.mark.slow

SMALL = ["+experiment=forecast", "data=series", "data.path=wave.csv", "data.history=12", "data.horizon=4"]
SMALL += ["data.season=12", "model.hidden_size=8", "logger=csv"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Returns the directory of a short job on a CSV file."""
    directory = tmp_path_factory.mktemp("wave")
    write_wave(directory / "wave.csv")
    arguments = [*SMALL, "data.column=price", "data.time_column=day", "trainer.max_epochs=40", "hydra.run.dir=out"]
    run("train", *arguments, cwd=directory, status=0)
    return directory


def test_beats_the_simplest_rules(job):
    """On a rising wave the model beats both naive forecasts, and the report shows it."""
    metrics = json.loads((job / "out" / "metrics.json").read_text())
    assert metrics["test/mae"] < 0.5 * metrics["baseline/naive_mae"]
    assert metrics["test/rmse"] < metrics["baseline/seasonal_naive_rmse"]
    # A series that rises 0.2 in each step is 2.4 higher after a season.
    assert metrics["baseline/seasonal_naive_mae"] == pytest.approx(2.4, abs=1e-3)
    assert 0 <= metrics["test/coverage"] <= 1 and "train/windows_per_second" in metrics
    page = (job / "out" / "report.html").read_text()
    assert all(title in page for title in ("Forecasts of the test", "Error by step", "mean absolute test error"))
    assert page.count('src="data:image/png;base64,') == 3


def test_evaluate_gives_the_same_numbers(job, tmp_path):
    """`lightkit.evaluate` computes the training's test metrics from the checkpoint and a moved file."""
    (job / "wave.csv").rename(tmp_path / "moved.csv")
    best = job / "out" / "checkpoints" / "best.ckpt"
    arguments = [f"ckpt_path={best}", "data_dir=moved.csv", "output=figures.json"]
    run("evaluate", *arguments, cwd=tmp_path, status=0)
    write_wave(job / "wave.csv")
    figures = json.loads((tmp_path / "figures.json").read_text())
    trained = json.loads((job / "out" / "metrics.json").read_text())
    assert figures == {name: trained[name] for name in figures}
    assert figures.keys() >= {"test/mae", "test/rmse", "test/coverage", "test/loss"}


def test_predict_another_file(job, tmp_path):
    """`lightkit.predict` forecasts the values after the end of another file, with intervals."""
    write_wave(tmp_path / "other.csv", rows=300)
    best = job / "out" / "checkpoints" / "best.ckpt"
    arguments = [f"ckpt_path={best}", "input=other.csv", "horizon=3", "output=out.csv"]
    result = run("predict", *arguments, cwd=tmp_path, status=0)
    rows = list(csv.DictReader(open(tmp_path / "out.csv", newline="")))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        time = 299 + int(row["step"])
        truth = 100 + 0.2 * time + 5 * math.sin(time * math.pi / 6)
        assert float(row["forecast"]) == pytest.approx(truth, abs=2.5)
        assert float(row["lower"]) < float(row["forecast"]) < float(row["upper"])
    assert "price: forecast (90% interval)" in result.stdout


def test_bad_predictions(job, tmp_path):
    """Too few rows, a long horizon, a gap at the end, a wrong column and keys of other tasks each raise an error."""
    restored = restore(job / "out" / "checkpoints" / "best.ckpt")
    write_wave(tmp_path / "short.csv", rows=5)
    write_wave(tmp_path / "whole.csv")
    write_wave(tmp_path / "gap.csv", row239="")
    cases = [
        ("short.csv", {}, "short.csv has 5 rows, but the model forecasts from 12"),
        ("gap.csv", {}, "gap.csv, column price: line 241 is empty"),
        ("whole.csv", {"column": "cost"}, "whole.csv has no column 'cost'; it has day, price"),
        ("whole.csv", {"invert": True}, "invert: the checkpoint is of a model for series"),
        ("whole.csv", {"horizon": 5}, "horizon must be from 1 to 4, got 5; to see further, train with data.horizon=5"),
    ]
    for name, keys, expected in cases:
        with pytest.raises(LightkitError) as error:
            prediction.predict(restored, prediction.PredictionRequest(str(tmp_path / name), **keys))
        assert expected in str(error.value)
    with pytest.raises(LightkitError, match=r"from 1 to 4, got 0$"):
        prediction.predict(restored, prediction.PredictionRequest(str(tmp_path / "whole.csv"), horizon=0))


@pytest.mark.parametrize(
    ("cells", "rows", "expected"),
    [
        ({"row7": ""}, 240, "wave.csv, column price: line 9 is empty"),
        ({"row7": "much"}, 240, "wave.csv, line 9, column price: 'much' is not a number"),
        ({}, 20, "too few for one window"),
    ],
    ids=["gap", "text", "short"],
)
def test_bad_files(call, tmp_path, cells, rows, expected):
    """An unusable file ends the command with one error before any training."""
    write_wave(tmp_path / "wave.csv", rows, **cells)
    result = call("train", *SMALL, "data.column=price", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert expected in result.stderr, result.stderr
