"""Fixtures of the tests of data."""

from __future__ import annotations

import pytest

from lightkit.data.columns import read_column
from lightkit.data.tables import TableSettings


@pytest.fixture
def read_times(tmp_path):
    """Returns a function that reads a file of times and the values 0.5, 1.5, 2.5 ..."""

    def call(times, leave_out=(), missing="error", time_column="when", **settings):
        rows = [f"{time};{row}.5" for row, time in enumerate(times) if row not in leave_out]
        (tmp_path / "v.csv").write_text("\n".join(["when;value", *rows, ""]))
        return read_column(tmp_path / "v.csv", "value", time_column, missing, TableSettings(**settings))

    return call
