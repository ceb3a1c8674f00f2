"""Each kind of input decodes requests, predicts and answers as lightkit.predict does."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from support.rows import write_customers
from support.serving import JSON, answer, answers, customers, digits, picture, wave, writer

from lightkit.app.prediction import PredictionRequest, images, series, table, text
from lightkit.app.serving.kinds import find_kind
from lightkit.app.serving.messages import Request
from lightkit.app.serving.responder import describe
from lightkit.data import DataModule, ImageFolder, MNIST5k
from lightkit.errors import CheckpointError, ConfigError
from lightkit.models import CNN
from lightkit.tasks import ClassificationTask, RegressionTask


@pytest.mark.parametrize("size", [(28, 28), (60, 41)])
def test_an_image_is_classified_as_by_predict(tmp_path, size):
    """A file as the body, in base64 and as pixels have the probabilities of lightkit.predict, to the bit."""
    kind, content = digits(), picture(size=size)
    (tmp_path / "a.png").write_bytes(content)
    torch.manual_seed(0)
    request = PredictionRequest(input=str(tmp_path / "a.png"), top_k=2)
    expected = images.predict(ClassificationTask(CNN()).eval(), MNIST5k(), request).entries()[0]
    del expected["path"]
    pixels = np.asarray(Image.open(io.BytesIO(content))).tolist()
    encoded = base64.b64encode(content).decode()
    for body, media_type in [
        (content, "image/png"),
        (content, ""),
        ({"image": encoded}, JSON),
        ({"pixels": pixels}, JSON),
        (json.dumps({"image": encoded}).encode(), "application/x-www-form-urlencoded"),
    ]:
        assert answer(kind, body, media_type, top_k="2") == (200, expected)
    assert answer(kind, {"image": encoded, "top_k": 2}) == (200, expected)
    assert answer(kind, content, "image/png", invert="true")[1]["probability"] != expected["probability"]


def test_colours(tmp_path):
    """A model of colour images takes grey pixels and RGB ones, and a grey model RGB pixels, as it takes files."""
    torch.manual_seed(0)
    data = ImageFolder("nowhere", image_size=20, channels=3, classes=["cat", "dog", "owl"])
    colour = find_kind(ClassificationTask(CNN(3, 3, 20)).eval(), data)
    rgb = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    for kind, pixels in [(colour, rgb), (colour, rgb[..., 0]), (digits(), rgb)]:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        assert answer(kind, {"pixels": pixels.tolist()}) == answer(kind, stream.getvalue(), "image/png")


def test_a_batch_answers_each_request_as_alone():
    """Answers do not depend on the batch beyond rounding, and wrong requests cost no other its answer."""
    kind = digits()
    bodies = [picture(seed) for seed in range(4)]
    alone = [answer(kind, body, "image/png") for body in bodies]
    bad = (b"\x89PNG\r\n\x1a\nx", "image/png", {})
    found = answers(kind, [bad, *((body, "image/png", {}) for body in bodies), bad])
    assert [status for status, _ in found] == [400, 200, 200, 200, 200, 400]
    for (_, one), (_, other) in zip(alone, found[1:-1], strict=True):
        assert one["label"] == other["label"]
        assert list(one["probabilities"].values()) == pytest.approx(list(other["probabilities"].values()), rel=1e-5)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_rows_are_predicted_as_by_predict(tmp_path, kind):
    """Rows as JSON objects and as CSV have the predictions of the file, to the bit, also in a batch."""
    task, data = customers(tmp_path, kind)
    path = write_customers(tmp_path / "new.csv", rows=12, seed=1)
    expected = table.predict(task, data, PredictionRequest(input=str(path))).entries()
    server = find_kind(task, data)
    lines = [line.split(",") for line in path.read_text().splitlines()]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]]
    if kind == "classification":
        rows = [{**row, "age": int(row["age"]) if row["age"] else None} for row in rows]
    else:
        rows = [{name: value for name, value in row.items() if name != "age"} for row in rows]
    (_, as_json), (_, as_csv) = answers(server, [({"rows": rows}, JSON, {}), (path.read_bytes(), "text/csv", {})])
    assert as_json["target"] == data.target
    for found in (as_json, as_csv):
        assert [entry["prediction"] for entry in found["predictions"]] == pytest.approx(
            [entry["prediction"] for entry in expected]
        )
    assert answer(server, {"rows": rows})[1]["predictions"] == expected
    german = path.read_text().replace(",", ";").encode("cp1252")
    found = answer(server, german, "text/csv", separator="semicolon")[1]
    assert found["predictions"] == expected and found["notes"] == ["separated by semicolons"]


def test_an_unknown_category_is_a_note(tmp_path, capsys):
    """A client learns what the model does not know; the server prints nothing."""
    task, data = customers(tmp_path)
    row = {"age": 30, "plan": "gold", "region": "north", "postcode": "01000", "since": "2015-01-15"}
    capsys.readouterr()
    status, found = answer(find_kind(task, data), {"rows": [row]})
    assert status == 200 and found["notes"] == ["plan: 1 cell is unknown to the model or rare in its training (gold)"]
    assert capsys.readouterr().out == ""


def test_a_forecast_is_that_of_predict(tmp_path):
    """Values as JSON and a CSV file have the forecast of the file, and a gap is closed as the request says."""
    task, data = wave(tmp_path)
    expected = series.predict(task, data, PredictionRequest(input=str(tmp_path / "wave.csv")))
    kind = find_kind(task, data)
    content = (tmp_path / "wave.csv").read_bytes()
    values = [float(line.split(",")[1]) for line in content.decode().splitlines()[1:]]
    steps = [asdict(step) for step in expected.steps]
    steps = [{name: value if np.isfinite(value) else None for name, value in step.items()} for step in steps]
    assert answer(kind, {"values": values[-12:]}) == (200, {"level": task.level, "forecast": steps})
    status, found = answer(kind, content, "text/csv", horizon="2")
    assert status == 200 and found["forecast"] == steps[:2] and found["name"] == "price"
    gap = [*values[-13:-5], None, *values[-4:]]
    assert answer(kind, {"values": gap, "missing": "interpolate"})[0] == 200
    status, found = answer(kind, {"values": gap})
    assert status == 400 and "values[8] is null (1 in all); missing=interpolate fills gaps" in found["error"]


def test_a_text_is_continued_as_by_predict():
    """The continuation is that of lightkit.predict with the same seed; a text may be the body."""
    task, data, kind = writer()
    request = PredictionRequest(text="the quick", length=20, seed=1, top_k=9, temperature=0.5)
    expected = text.predict(task, data, request).entry()
    options = {"length": 20, "seed": 1, "top_k": 9, "temperature": 0.5}
    assert answer(kind, {"text": "the quick", **options}) == (200, expected)
    query = {name: str(value) for name, value in options.items()}
    assert answer(kind, b"the quick", "text/plain", **query) == (200, expected)
    # Without a length the text grows by no more than the server allows.
    assert answer(kind, {"text": "", "temperature": 0})[0] == 200
    assert len(kind.predict([kind.decode(Request(b"a", "text/plain", {}))])[0].added) == 50


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_predicted_as_by_the_result(dtype):
    """A model of arrays takes nested lists, and answers with names of classes and probabilities."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(0, 9, (20, 5)).astype(dtype)
    data = DataModule.from_arrays(x, ["a", "b"] * 10)
    task = ClassificationTask(torch.nn.Linear(5, 2)).eval()
    status, found = answer(find_kind(task, data), {"x": x[:3].tolist()})
    expected = task.predict_step(data.to_input(data.encode(x[:3])[0]), 0)
    assert status == 200
    assert [list(entry["probabilities"].values()) for entry in found["predictions"]] == expected.tolist()
    values = find_kind(RegressionTask(torch.nn.Linear(5, 2), num_targets=2).eval(), DataModule.from_arrays(x))
    assert np.shape(answer(values, {"x": x.tolist()})[1]["predictions"]) == (20, 2)


def test_a_fault_of_the_model_tells_nothing(capsys):
    """An error of the program costs the one request; the client gets no traceback."""
    kind = digits()
    original = kind.predict

    def predict(samples):
        if any(int(sample.pixels.max()) == 7 for sample in samples):
            raise RuntimeError("in /secret/path")
        return original(samples)

    kind.predict = predict
    bad, good = {"pixels": [[7] * 28] * 28}, {"pixels": [[9] * 28] * 28}
    found = answers(kind, [(good, JSON, {}), (bad, JSON, {}), (good, JSON, {})])
    assert [status for status, _ in found] == [200, 500, 200]
    assert found[1][1] == {"error": "the server has failed to answer this request; its output has the reason"}
    assert "in /secret/path" in capsys.readouterr().err


def test_the_description_has_what_a_client_needs(tmp_path):
    """Each kind names its input, answers its own example, and its description is JSON."""
    torch.manual_seed(0)
    data = DataModule.from_arrays(np.random.default_rng(0).random((20, 5)), ["a", "b"] * 10)
    arrays = ClassificationTask(torch.nn.Linear(5, 2)).eval()
    models = {
        "images": (ClassificationTask(CNN()).eval(), MNIST5k()),
        "tables": customers(tmp_path),
        "series": wave(tmp_path),
        "text": writer()[:2],
        "arrays": (arrays, data),
    }
    for name, (task, module) in models.items():
        found = describe(find_kind(task, module), task)
        assert found["about"]["kind"] == name and found["about"]["task"] == type(task).__name__
        assert json.loads(json.dumps(found)) == found
        assert set(found["example"]) - set(found["options"]) <= set(found["content"])


def test_a_model_that_does_not_work_is_found_at_the_start():
    """The server does not start with a model that cannot answer."""
    task = ClassificationTask(torch.nn.Linear(3, 10)).eval()
    with pytest.raises(CheckpointError, match="the model does not answer an example"):
        describe(find_kind(task, MNIST5k()), task)
    with pytest.raises(ConfigError, match="the model has no data module"):
        find_kind(task, None)
