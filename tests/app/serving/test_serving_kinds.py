"""Each kind of input decodes requests, predicts as lightkit.predict does, and rejects what is wrong in one line."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.rows import write_customers
from support.series import write_wave

from lightkit.app.prediction import PredictionRequest, images, series, table, text
from lightkit.app.serving.kinds import find_kind
from lightkit.app.serving.messages import Request
from lightkit.app.serving.responder import Responder, describe
from lightkit.data import DataModule, ImageFolder, MNIST5k, Series, TableDataModule, Text
from lightkit.errors import CheckpointError, ConfigError
from lightkit.models import CNN, MLP, RNN, Transformer
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask

JSON = "application/json"


def answer(kind, body, media_type=JSON, **query):
    """Returns the status and the object with which a kind answers one request."""
    found = answers(kind, [(body, media_type, query)])
    return found[0]


def answers(kind, requests):
    """Returns the status and the object for each request of a batch."""
    replies = {}
    encoded = [
        Request(body if isinstance(body, bytes) else json.dumps(body).encode(), media_type, query)
        for body, media_type, query in requests
    ]
    Responder(kind).answer(encoded, replies.__setitem__)
    return [(replies[index].status, json.loads(replies[index].body)) for index in range(len(requests))]


def picture(seed=0, size=(28, 28), format="PNG"):
    """Returns the content of an image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def digits():
    torch.manual_seed(0)
    return find_kind(ClassificationTask(CNN()).eval(), MNIST5k())


def customers(tmp_path, kind="classification"):
    torch.manual_seed(0)
    target = "leaves" if kind == "classification" else "age"
    data = TableDataModule(str(write_customers(tmp_path / "customers.csv")), target, kind=kind)
    data.setup()
    sizes = {name: data.model_sizes()[name] for name in ("input_size", "category_sizes", "num_outputs")}
    model = MLP(**sizes)
    task = ClassificationTask(model) if kind == "classification" else RegressionTask(model, num_targets=1)
    return task.eval(), data


def wave(tmp_path, **options):
    torch.manual_seed(0)
    write_wave(tmp_path / "wave.csv")
    data = Series(path=str(tmp_path / "wave.csv"), column="price", history=12, horizon=4, **options)
    return ForecastTask(RNN(1, 4, 4), horizon=4).eval(), data


def writer(max_length=50):
    torch.manual_seed(0)
    task = LanguageModelTask(Transformer(256, 16, 1, 2, context=16)).eval()
    return task, Text(context=16), find_kind(task, Text(context=16), max_length=max_length)


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


DEEP = b"[" * 100_000
BAD_IMAGES = [
    (b"", JSON, {}, 400, "the body is empty, expected application/json or image/*"),
    (b"{", JSON, {}, 400, "the body is no JSON: "),
    (DEEP, JSON, {}, 400, "the body is no JSON: it is nested too deeply"),
    (b'{"pixels": [[NaN]]}', JSON, {}, 400, "NaN is no number of JSON"),
    (b"\xff{}", JSON, {}, 400, "the body is no JSON"),
    ([1, 2], JSON, {}, 400, "must be an object of JSON with named fields, got a list of 2 values"),
    ({}, JSON, {}, 400, "must have the field image or pixels, got none"),
    ({"image": "", "pixels": []}, JSON, {}, 400, 'must have the field image or pixels, got "image", "pixels"'),
    ({"imgae": "x"}, JSON, {}, 400, 'must have the field image or pixels, got "imgae"'),
    ({"image": 3}, JSON, {}, 400, "image must be a text in base64, got 3"),
    ({"image": "a*b"}, JSON, {}, 400, 'image must be a text in base64, got "a*b"'),
    ({"image": "aGFsbG8="}, JSON, {}, 400, "image is not an image (PNG"),
    ({"image": ""}, JSON, {}, 400, "image is empty (0 bytes)"),
    ({"pixels": 3}, JSON, {}, 400, "pixels must be rows of equally many pixels"),
    ({"pixels": [[1], [1, 2]]}, JSON, {}, 400, "got rows of different lengths"),
    ({"pixels": [[0.5]]}, JSON, {}, 400, "got values that are no whole numbers"),
    ({"pixels": [[True]]}, JSON, {}, 400, "got values that are no whole numbers"),
    ({"pixels": [[2**80]]}, JSON, {}, 400, "got values that are no whole numbers"),
    ({"pixels": [[256]]}, JSON, {}, 400, "pixels must be numbers from 0 to 255, got 256"),
    ({"pixels": [[-1]]}, JSON, {}, 400, "pixels must be numbers from 0 to 255, got -1"),
    ({"pixels": [[]]}, JSON, {}, 400, "of the shape (1, 0)"),
    ({"pixels": [[[1, 2]]]}, JSON, {}, 400, "of the shape (1, 1, 2)"),
    ({"pixels": [[1]], "topk": 1}, JSON, {}, 400, '"topk" is no field of a request; did you mean top_k?'),
    ({"pixels": [[1]], "top_k": 11}, JSON, {}, 400, "top_k must be from 1 to 10, the number of classes, got 11"),
    ({"pixels": [[1]], "top_k": True}, JSON, {}, 400, "top_k must be int or null, got True"),
    ({"pixels": [[1]], "top_k": [1]}, JSON, {}, 400, "top_k must be"),
    ({"pixels": [[1]], "invert": "maybe"}, JSON, {}, 400, "invert must be auto, true or false, got 'maybe'"),
    ({"pixels": [[1]], "invert": [1]}, JSON, {}, 400, "invert must be a single value, got a list of 1 value"),
    ({"pixels": [[1]], "top_k": 1}, JSON, {"top_k": "1"}, 400, '"top_k" stands both in the body and in the query'),
    (picture(), "image/png", {"top_k": "x"}, 400, "top_k must be int or null, got 'x'"),
    (picture(), "image/png", {"input": "/etc/passwd"}, 400, '"input" is no field of a request'),
    ({"pixels": [[1]], "input": "/etc/passwd"}, JSON, {}, 400, '"input" is no field of a request'),
    (picture(), "text/csv", {}, 415, "Content-Type must be application/json or image/*, got text/csv"),
    (picture(), "multipart/form-data", {}, 415, "Content-Type must be application/json or image/*, got multipart/"),
    (picture()[:300], "image/png", {}, 400, "the body is a damaged image"),
    (b"P6 9 9 255\n", "image/x-portable-pixmap", {}, 400, "the body is not an image (PNG"),
]


@pytest.mark.parametrize(("body", "media_type", "query", "status", "message"), BAD_IMAGES)
def test_a_wrong_image_is_one_line(body, media_type, query, status, message):
    """The error names the field, its value and what was expected; no file of the server can be named."""
    found, content = answer(digits(), body, media_type, **query)
    assert (found, list(content)) == (status, ["error"])
    assert message in content["error"] and "\n" not in content["error"] and "Traceback" not in content["error"]


@pytest.mark.parametrize(
    ("body", "media_type", "message"),
    [
        ({"rows": []}, JSON, "rows must have at least one row, got none"),
        ({"rows": {}}, JSON, "rows must be a list of objects, got an object of 0 values"),
        ({"rows": [3]}, JSON, "rows, row 1 must map names of columns to values, got a value of type int"),
        ({"rows": [{}]}, JSON, "rows must have at least one column"),
        ({"rows": [{"age": [1]}]}, JSON, "rows, row 1, column age must be a text, a number, a truth value or null"),
        ({"rows": [{"age": 3}]}, JSON, "rows has no column plan"),
        ({"rows": [{"age": "x", "plan": 1, "region": 1, "postcode": 1, "since": ""}]}, JSON, "row 1, column age: 'x'"),
        (b"age\n1\n", "text/csv", "the table has no column plan"),
        (b"\0\0", "text/csv", "the table is not a CSV file"),
        (b"\x1f\x8b\x08\x00", "text/csv", "the table"),
        (b"PK\x03\x04", "text/csv", "the table"),
        ({"rows": [{"age": 1}], "header": True}, JSON, '"header" is no field of a request'),
    ],
)
def test_wrong_rows_are_one_line(tmp_path, body, media_type, message):
    """The error names row and column; a packed table and a workbook are not unpacked."""
    status, content = answer(find_kind(*customers(tmp_path)), body, media_type)
    assert status == 400 and message in content["error"] and "\n" not in content["error"]


@pytest.mark.parametrize(
    ("body", "media_type", "message"),
    [
        ({"values": 3}, JSON, "values must be a list of numbers, got 3"),
        ({"values": []}, JSON, "values must have numbers, got an empty list"),
        ({"values": [1, "x"]}, JSON, 'values[1] must be a number or null, got "x"'),
        ({"values": [True]}, JSON, "values[0] must be a number or null, got true"),
        (b'{"values": [1, 1e999]}', JSON, "values[1] must be finite"),
        ({"values": [10**400]}, JSON, "values must be numbers below 1.8e308"),
        ({"values": [1, 2]}, JSON, "the series has 2 values, but the model forecasts from 12"),
        ({"values": [1] * 12, "horizon": 9}, JSON, "horizon must be from 1 to 4, got 9"),
        ({"values": [1] * 12, "missing": "x"}, JSON, "missing must be one of error, interpolate, drop, got 'x'"),
        ({"values": [None] * 12}, JSON, "values: no cell has a number"),
        (b"a,b\n1,2\n", "text/csv", "the table has no column 'price'"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, body, media_type, message):
    """The error names the index of the value."""
    status, content = answer(find_kind(*wave(tmp_path)), body, media_type)
    assert status == 400 and message in content["error"] and "\n" not in content["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": 3}, "text must be a text, got 3"),
        ({"text": "a", "length": 51}, "length must be at most 50, got 51"),
        ({"text": "a", "length": 0}, "length must be at least 1, got 0"),
        ({"text": "a", "temperature": -1}, "temperature must be at least 0, got -1"),
        ({"text": "a", "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"text": "a", "seed": -1}, "seed must be from 0"),
        ({"text": "a" * 65537}, "text must have at most 65,536 bytes, got 65,537"),
        ({"text": "a", "input": "/etc/passwd"}, '"input" is no field of a request'),
    ],
)
def test_a_wrong_text_is_one_line(body, message):
    """No request can keep the model busy for longer than the server allows."""
    status, content = answer(writer()[2], body)
    assert status == 400 and message in content["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"x": 3}, "x must be nested lists of numbers, got 3"),
        ({"x": [[1], [1, 2]]}, "got lists of different lengths"),
        ({"x": [["a", 1]]}, "x must be nested lists of numbers, got other values"),
        ({"x": [[1, 2]]}, "x must have the shape (N, 5) as in the training, got (1, 2)"),
        ({"x": [[1e300, 1, 1, 1, 1]]}, "x has a value that is not finite in sample 0"),
        ({"x": []}, "x must have"),
    ],
)
def test_wrong_arrays_are_one_line(body, message):
    """The error has the shape of the training."""
    data = DataModule.from_arrays(np.random.default_rng(0).random((20, 5)), ["a", "b"] * 10)
    status, content = answer(find_kind(ClassificationTask(torch.nn.Linear(5, 2)).eval(), data), body)
    assert status == 400 and message in content["error"]


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(["image", "pixels", "rows", "values", "text", "x", "top_k", "invert", "horizon", "length"])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    place = tmp_path_factory.mktemp("kinds")
    data = DataModule.from_arrays(np.random.default_rng(0).random((20, 5)), ["a", "b"] * 10)
    arrays = find_kind(ClassificationTask(torch.nn.Linear(5, 2)).eval(), data)
    return [digits(), find_kind(*customers(place)), find_kind(*wave(place)), writer(3)[2], arrays]


@given(fields=st.dictionaries(NAMES, VALUES, max_size=3), query=st.dictionaries(NAMES, st.text(max_size=5), max_size=1))
@settings(max_examples=150, deadline=None)
def test_any_object_is_answered_or_a_wrong_request(kinds, fields, query):
    """No object of JSON is a fault of the server, whatever stands in its fields."""
    for kind in kinds:
        status, content = answer(kind, json.dumps(fields, allow_nan=True).encode(), JSON, **query)
        assert status == 200 or (400 <= status < 500 and list(content) == ["error"]), content


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"{", b"a,b\n", b"BM", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_answered_or_a_wrong_request(kinds, content, beginning):
    """No file is a fault of the server either."""
    for kind in kinds:
        for media_type in ("", JSON, *(name + "png" if name == "image/" else name for name in kind.media_types)):
            status, found = answer(kind, beginning + content, media_type)
            assert status == 200 or (400 <= status < 500 and list(found) == ["error"]), found


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
