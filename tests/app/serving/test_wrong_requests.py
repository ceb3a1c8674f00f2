"""A wrong request gets one line with the field, its value and what was expected, and is no fault of the server."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import JSON, answer, customers, digits, picture, wave, writer

from lightkit.app.serving.kinds import find_kind
from lightkit.data import DataModule
from lightkit.tasks import ClassificationTask

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
