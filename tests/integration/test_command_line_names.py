"""Files, columns and runs with the names that people give them, from the command line to the results."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.commands import run, run_python, the_error

pytestmark = [pytest.mark.slow]

# Names of files that Hydra's parser, a terminal's markup, CSV or UTF-8 would not leave alone.
NAMES = [
    *("scan (1).png", "müller.png", "it's.png", "新.png", "epoch=3.png", "#1.png", "a,b.png", "[x].png", "50%.png"),
    *("a: b.png", "C:\\x.png", '"q".png', " x.png", "x.png ", "{a}.png", "a&b.png", "null.png", "$HOME.png"),
    *("${x}.png", "1e5", "0x10", "on", "007", "[red]x.png", ":smile:.png", "\udcff.png", "a\nb.png", "~.png", "last"),
]

SERIES = ["+experiment=forecast", "+debug=quick", "data=series", "data.history=12", "data.horizon=3", "trainer=cpu"]
QUICK = ["+experiment=cnn", "+debug=quick", "trainer=cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns the checkpoint of a very short run with images."""
    directory = tmp_path_factory.mktemp("short")
    run("train", *QUICK, "hydra.run.dir=out", cwd=directory, status=0)
    return directory / "out" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory):
    """Returns the checkpoint of a very short run with a series."""
    directory = tmp_path_factory.mktemp("series")
    write_series(directory / "v.csv", "a", "b")
    run("train", *SERIES, "data.path=v.csv", "data.column=a", "hydra.run.dir=out", cwd=directory, status=0)
    return directory / "out" / "checkpoints" / "last.ckpt"


def write_series(path: Path, *columns: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([round(math.sin(i / 5 + k) * 9 + i % 7, 3) for k in range(len(columns))] for i in range(300))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_of_a_prediction(call, tmp_path, checkpoint, name):
    """``input``, ``output`` and ``ckpt_path`` are the files of these names, and CSV has the name of the image."""
    Image.new("L", (28, 28), 9).save(tmp_path / name, format="PNG")
    (tmp_path / f"{name}.ckpt").write_bytes(checkpoint.read_bytes())
    result = call("predict", f"ckpt_path={name}.ckpt", f"input={name}", f"output={name}.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / f"{name}.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        (_, row) = csv.reader(file)
    assert row[0] == name
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name}.ckpt", f"{name}.csv"])


def test_names_in_a_folder(call, tmp_path, checkpoint):
    """A folder of images with such names is predicted, shown and written; the terminal shows all of each name."""
    (tmp_path / "in [1]").mkdir()
    names = sorted(name for name in NAMES if name.endswith(".png"))
    for name in names:
        Image.new("L", (28, 28), 9).save(tmp_path / "in [1]" / name, format="PNG")
    result = call("predict", f"ckpt_path={checkpoint}", "input=in [1]", "output=out.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row[0] for row in csv.reader(file)][1:] == [f"in [1]/{name}" for name in names]
    assert 'in [1]/"q".png' in result.stdout


# Names of columns that a terminal's markup or matplotlib's formulas would not leave alone.
COLUMNS = [
    "Temp [degC]",
    "Rate [/s]",
    "Price $",
    "US$ and $",
    "a_b^c",
    "\\alpha",
    "100%",
    "{}",
    "_x",
    "气温",
    "2020",
    "a,b",
]


@pytest.mark.parametrize("column", COLUMNS)
def test_names_of_columns(call, tmp_path, forecaster, column):
    """A forecast of a column with such a name is written and shown under its name."""
    write_series(tmp_path / "my values (1).csv", column, "other")
    words = [f"ckpt_path={forecaster}", "input=my values (1).csv", f"column={column}", "output=forecast [1].csv"]
    result = call("predict", *words, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.strip().startswith(f"{column}: forecast"), result.stderr
    assert len((tmp_path / "forecast [1].csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("column", ["US$ [/s] \\frac{$ 气温🦄"])
def test_training_with_such_a_column(tmp_path, column):
    """A training with such a column, file, name and directory ends with its report, and resumes by ckpt_path=last."""
    write_series(tmp_path / "Übersicht (1), ${x}.csv", column, "other")
    words = ["data.path=Übersicht (1), ${x}.csv", f"data.column={column}", "name=läuft [/v2], it's #1"]
    result = run("train", *SERIES, *words, cwd=tmp_path, status=0)
    assert "Warning" not in result.stderr and "Glyph" not in result.stderr
    (metrics,) = tmp_path.glob("runs/läuft [/v2], it's #1/*/metrics.json")
    assert "test/loss" in json.loads(metrics.read_text())
    page = (metrics.parent / "report.html").read_text(encoding="utf-8")
    assert "Forecasts of the test" in page and "could not be made" not in page
    again = run("train", *SERIES, *words, "ckpt_path=last", "trainer.max_epochs=2", cwd=tmp_path, status=0)
    assert "continuing runs/läuft [/v2], it's #1/" in again.stdout
    result = run("evaluate", f"ckpt_path={metrics.parent}/checkpoints/best.ckpt", cwd=tmp_path, status=0)
    assert "test/loss" in result.stdout


def test_evaluation_of_such_a_file(call, tmp_path, monkeypatch, forecaster):
    """``data_dir`` and ``output`` of an evaluation are such files, below the home directory too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_series(tmp_path / "Übersicht (1), ${x}.csv", "a", "b")
    words = [f"ckpt_path={forecaster}", "data_dir=~/Übersicht (1), ${x}.csv", "output=it's [1].json"]
    result = call("evaluate", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "test/mae" in json.loads((tmp_path / "it's [1].json").read_text())


def test_several_processes_get_the_same_names(tmp_path):
    """The processes of a job read the file that the leading process was given; ``${`` in its name is no reference."""
    write_series(tmp_path / "it's ${x}.csv", "Rate [/s]")
    words = ["data.path=it's ${x}.csv", "hydra.run.dir=out", "strategy=ddp", "trainer.devices=2"]
    run("train", *SERIES, *words, cwd=tmp_path, status=0)
    assert (tmp_path / "out" / "report.html").exists()


def test_a_directory_that_is_not_utf8(tmp_path):
    """A run in a directory whose name has other bytes writes everything there, and resumes."""
    directory = "run_\udcff [/x]"
    assert "use logger=csv" in the_error(run("train", *QUICK, f"hydra.run.dir={directory}", cwd=tmp_path))
    words = [*QUICK, f"hydra.run.dir={directory}", "logger=csv"]
    run("train", *words, cwd=tmp_path, status=0)
    assert {"metrics.json", "report.html", "config.yaml"} <= set(os.listdir(tmp_path / directory))
    result = run("train", *words, f"ckpt_path={directory}/checkpoints/last.ckpt", "trainer.max_epochs=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_sweep_over_such_files(tmp_path):
    """With -m, commas separate files of such names; the sweep is finished by ckpt_path=last."""
    for name in ("scan (1).csv", "müller [x].csv"):
        write_series(tmp_path / name, "a")
    words = [*SERIES, "-m", "data.path=scan (1).csv,müller [x].csv", "test=false", "name=s (1)"]
    run("train", *words, cwd=tmp_path, status=0)
    paths = [
        json.loads(p.read_text())["config"]["data"]["path"] for p in tmp_path.glob("runs/s (1)/*/*/.hydra/run.json")
    ]
    assert sorted(paths) == ["müller [x].csv", "scan (1).csv"]
    result = run("train", *words, "ckpt_path=last", cwd=tmp_path)
    assert "is finished" in the_error(result)


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_terminals_without_these_characters(tmp_path, checkpoint, variables):
    """A terminal of few characters gets escapes, and the results are written."""
    for name in ("müller.png", "新 \udcff.png"):
        # An image of one shade gets a warning.
        Image.radial_gradient("L").resize((28, 28)).save(tmp_path / name, format="PNG")
        words = [f"ckpt_path={checkpoint}", f"input={name}", "output=out.csv"]
        result = run_python("-m", "lightkit.predict", *words, cwd=tmp_path, environment=variables, status=0)
        assert result.stderr == "" and (tmp_path / "out.csv").exists()
        (tmp_path / "out.csv").unlink()


def test_a_reader_that_has_gone(tmp_path):
    """A training whose output nobody reads any more, as after ``| head -1``, goes on to its report."""
    words = [*QUICK, "hydra.run.dir=out", "trainer.max_epochs=3"]
    command = [sys.executable, "-m", "lightkit.train", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"epoch 1/3")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_predictions_are_written_before_they_are_shown(call, monkeypatch, tmp_path, checkpoint):
    """An error while the predictions are printed, such as a full disk's, does not lose them."""
    monkeypatch.setattr("lightkit.app.prediction.images.ImagePredictions.show", lambda self: 1 / 0)
    monkeypatch.setattr("lightkit.app.console.print_table", lambda *arguments: 1 / 0)
    Image.new("L", (28, 28), 9).save(tmp_path / "x.png")
    for name, words in (("predict", ["input=x.png"]), ("evaluate", [])):
        with pytest.raises(ZeroDivisionError):
            call(name, f"ckpt_path={checkpoint}", *words, f"output={name}", cwd=tmp_path)
        assert (tmp_path / name).exists()
