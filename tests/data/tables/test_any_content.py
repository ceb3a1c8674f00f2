"""Any content of a file is read or is one DataError: no other exception, whatever the settings are."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkit.data.columns import read_column
from lightkit.data.tables import TableSettings
from lightkit.errors import DataError

CELLS = st.sampled_from(
    ["", "1", "-2.5", "1,5", "1.234", "1'234", "$5", "5%", "(3)", "NA", "x", '"', '"a"', '"1,5"', "#", "inf", "1e400"]
    + ["2020-01-01", "2020-02-30", "01/02/2020", "31.12.2020", "2020Q1", "2020-01", "20200101", "2020-W53", "1949"]
    + [
        "2020-01-01 03:04",
        "2020-01-01T03:04:05Z",
        "2020-01-02T03:04:05+05:30",
        "0.1",
        "1" * 500,
        "\u202e",
        "'",
        "9" * 20,
    ]
    + ["0000-01-01", "9999-12-31", "9999-12", "9999Q4", "00000101", "Jan 2020", "31-Feb-2020", "12:00", "-", "1_000"]
)
ROWS = st.lists(st.lists(CELLS, max_size=3), max_size=8)
SETTINGS = st.builds(
    TableSettings,
    separator=st.sampled_from([None, "comma", "semicolon"]),
    decimal=st.sampled_from([None, "comma", "point"]),
    header=st.sampled_from([None, True, False]),
    day_first=st.sampled_from([None, True, False]),
    skip_lines=st.sampled_from([None, 0, 2]),
)


def check(path, content, missing, time_column, given):
    path.write_bytes(content)
    try:
        found = read_column(path, None, time_column, missing, given)
    except DataError:
        return
    assert found.values.isfinite().all() and len(found) == len(found.measured)
    assert found.times is None or len(found.times) == len(found)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "values.csv"


@given(ROWS, st.sampled_from(",;\t"), st.sampled_from(["error", "interpolate", "drop"]), SETTINGS, st.booleans())
@settings(max_examples=400)
def test_any_cells(path, rows, separator, missing, given, has_times):
    """Any rows of plausible cells."""
    content = "\n".join(["a" + separator + "b", *(separator.join(row) for row in rows)])
    check(path, content.encode(), missing, "a" if has_times else None, given)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"PK\x03\x04", b"sep="])
)
@settings(max_examples=200)
def test_any_bytes(path, content, begin):
    """Any bytes, also behind the first bytes of a known kind of file, and packed."""
    check(path, begin + content, "drop", None, TableSettings())
    check(path, gzip.compress(begin + content), "drop", None, TableSettings())


@given(st.lists(CELLS, min_size=1, max_size=6), st.sampled_from(["error", "interpolate"]))
@settings(max_examples=400)
def test_any_times(path, cells, missing):
    """Any column of times, whether or not it is in order."""
    rows = "".join(f'"{cell}";{index}.5\n' for index, cell in enumerate(cells) if '"' not in cell)
    check(path, ("a;b\n" + rows).encode(), missing, "a", TableSettings())
