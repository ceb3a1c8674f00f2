"""The files of a run that other programs read."""

from __future__ import annotations

import json
import math

import pytest

from lightkit._util import strict_json
from lightkit.app.run_files import read_if_newer, write_json


def test_metrics_are_json(tmp_path):
    """Metrics that are no numbers are null for every reader of JSON, and NaN for a training that goes on."""
    path = tmp_path / "metrics.json"
    write_json(path, {"a": math.nan, "b": math.inf, "c": [-math.inf, {"d": 1.5}], "e": 7, "f": True})
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content == {"a": None, "b": None, "c": [None, {"d": 1.5}], "e": 7, "f": True}
    write_json(path, {"a": math.nan, "b": 1e300})
    read = read_if_newer(path, path)
    assert math.isnan(read["a"]) and read["b"] == 1e300


def test_numbers_as_texts():
    """A configuration keeps the difference between NaN, infinities and null; a key may be such a number too."""
    text = strict_json.dumps({"a": [math.nan, math.inf, -math.inf, None], math.nan: 1}, as_text=True)
    assert json.loads(text) == {"a": ["nan", "inf", "-inf", None], "nan": 1}
