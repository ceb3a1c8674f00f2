"""An input names a file, a folder, several of them or a pattern; a path that exists is always itself."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from support.pictures import write_classes, write_picture

from lightkit.app.prediction import PredictionRequest, images, series, text
from lightkit.app.prediction.inputs import find_inputs
from lightkit.data import ImageFolder, MNIST5k
from lightkit.errors import ConfigError, DataError
from lightkit.models import CNN
from lightkit.tasks import ClassificationTask


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Returns a folder of images, in which the tests work."""
    for name in (
        "a.png",
        "b/c.jpg",
        "b/deep/d.tif",
        "e.png",
        "f,g.png",
        "[a.png,e.png]",
        "h[1].png",
        "k*.png",
        "kx.png",
    ):
        write_picture((tmp_path / name).with_name("x.png")).rename(tmp_path / name)
    (tmp_path / "b" / "readme.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.png", ["a.png"]),
        ("b", ["b/c.jpg", "b/deep/d.tif"]),
        ("[e.png,a.png]", ["e.png", "a.png"]),
        ("[ e.png, b/ ]", ["e.png", "b/c.jpg", "b/deep/d.tif"]),
        ("[a.png,a.png,.//a.png]", ["a.png"]),
        ("[f,g.png,a.png]", ["f,g.png", "a.png"]),
        ("b/*.jpg", ["b/c.jpg"]),
        ("[abe].png", ["a.png", "e.png"]),
        ("[[ae].png,b/**/d.*]", ["a.png", "e.png", "b/deep/d.tif"]),
        ("?.png", ["a.png", "e.png"]),
        ("b/*", ["b/c.jpg", "b/deep/d.tif", "b/readme.txt"]),
        # Names that look like a list or a pattern and are those of files.
        ("[a.png,e.png]", ["[a.png,e.png]"]),
        ("h[1].png", ["h[1].png"]),
        ("k*.png", ["k*.png"]),
        (["e.png", "k*.png"], ["e.png", "k*.png"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_an_input_names(scans, given, expected):
    """Files, folders with their subfolders, lists in brackets and patterns; each image once."""
    assert [str(path) for path in find_inputs(given)] == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("gone.png", DataError, r"^input=gone\.png does not exist$"),
        ("[a.png,gone.png]", DataError, r"^input=gone\.png does not exist$"),
        ("gone*.png", DataError, r"^input=gone\*\.png does not exist, and no path has this pattern$"),
        ("[a.png,gone*]", DataError, r"^a part of input=gone\* does not exist, and no path has this pattern$"),
        ("[]", ConfigError, r"^input must name an image, a folder or several of them, got an empty list$"),
        ([], ConfigError, r"got an empty list$"),
    ],
)
def test_nothing_of_that_name(scans, given, error, message):
    """One line names the part that is wrong."""
    with pytest.raises(error, match=message):
        find_inputs(given)


def predictions(tmp_path, **fields):
    torch.manual_seed(0)
    data = ImageFolder("nowhere", image_size=20, channels=3, classes=["cat", "dog", "owl"])
    task = ClassificationTask(CNN(3, 3, 20)).eval()
    return images.predict(task, data, PredictionRequest(input=str(tmp_path / "pets"), **fields))


@pytest.mark.parametrize("suffix", [".json", ".JSONL", ".csv", ".txt"])
def test_files_of_predictions(tmp_path, suffix, capsys, monkeypatch):
    """JSON has all probabilities, CSV the first classes; both have each image that was skipped, with its reason."""
    monkeypatch.setenv("COLUMNS", "300")
    write_classes(tmp_path / "pets", {"cat": 2, "dog": 1})
    (tmp_path / "pets" / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 1 of 4 images"):
        found = predictions(tmp_path, top_k=2)
    path = tmp_path / f"out{suffix}"
    found.write(path)
    found.show()
    shown = capsys.readouterr().out
    assert "cat/000.png" in shown and "else" in shown
    expected = [str(tmp_path / "pets" / name) for name in ("cat/000.png", "cat/001.png", "dog/000.png", "bad.png")]
    if suffix.lower() in (".json", ".jsonl"):
        content = path.read_text()
        entries = json.loads(content) if suffix == ".json" else [json.loads(line) for line in content.splitlines()]
        assert [entry["path"] for entry in entries] == expected
        assert entries[-1]["error"].endswith("is empty (0 bytes)")
        for entry in entries[:-1]:
            assert list(entry["probabilities"]) == ["cat", "dog", "owl"]
            assert sum(entry["probabilities"].values()) == pytest.approx(1)
            assert [top["probability"] for top in entry["top"]] == sorted(entry["probabilities"].values())[:0:-1]
            assert entry["top"][0] == {"label": entry["label"], "probability": entry["probability"]}
        return
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert [row["path"] for row in rows] == expected
    assert rows[-1]["label"] == rows[-1]["probability_2"] == "" and rows[-1]["error"].endswith("is empty (0 bytes)")
    assert all(0 < float(row["probability_2"]) <= float(row["probability"]) and row["error"] == "" for row in rows[:-1])


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_wrong_number_of_classes(tmp_path, top_k):
    """The error has the range, before an image is read."""
    with pytest.raises(ConfigError, match=rf"top_k must be from 1 to 3, the number of classes, got {top_k}"):
        predictions(tmp_path, top_k=top_k)


def test_many_batches(tmp_path):
    """The images are read batch by batch, and are the same in any number of batches."""
    write_classes(tmp_path / "pets", {"cat": 4, "dog": 3})
    one, other = predictions(tmp_path, batch_size=100), predictions(tmp_path, batch_size=2)
    torch.testing.assert_close(one.probabilities, other.probabilities)
    assert [image.path for image in one.images] == [image.path for image in other.images]


def test_forecasts_and_texts_as_json(tmp_path):
    """The steps of a forecast, and the prompt and its continuation."""
    forecast = series.Forecast("v", 0.9, [series.ForecastStep(1, 2.5, 2.0, float("nan"))])
    forecast.write(tmp_path / "steps.json")
    assert json.loads((tmp_path / "steps.json").read_text()) == [
        {"step": 1, "forecast": 2.5, "lower": 2.0, "upper": None}
    ]
    forecast.write(tmp_path / "steps.csv")
    assert (tmp_path / "steps.csv").read_text().splitlines() == ["step,forecast,lower,upper", "1,2.5,2.0,nan"]
    text.Continuation("naïve ".encode(), b"\xff").write(tmp_path / "text.jsonl")
    assert json.loads((tmp_path / "text.jsonl").read_text()) == {"prompt": "naïve ", "added": "\ufffd"}


def test_grey_digits_in_folders(tmp_path):
    """The images of nested folders are found for every data module."""
    write_picture(tmp_path / "pets" / "1" / "a.png", (9, 9, 9))
    found = images.predict(ClassificationTask(CNN()).eval(), MNIST5k(), PredictionRequest(input=str(tmp_path / "pets")))
    assert [image.path.name for image in found.images] == ["a.png"]
