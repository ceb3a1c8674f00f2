"""Fixtures of the tests of tables."""

from __future__ import annotations

import pytest

from lightkit.data.columns import read_column
from lightkit.data.tables import TableSettings


@pytest.fixture
def read(tmp_path):
    """Returns a function that writes a file and reads its column of numbers."""

    def call(content, written_as="utf-8", column=None, missing="error", **settings):
        path = tmp_path / "values.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(written_as))
        return read_column(path, column, missing=missing, settings=TableSettings(**settings))

    return call
