"""Times as people write them: read exactly, or an error of the cell."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pytest

from lightkit.data.tables.times import parse_times
from lightkit.errors import DataError


def parse(*cells, day_first=None):
    return parse_times(np.array(cells, dtype=object), day_first, None)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("2020-01-02", "2020-01-02"),
        ("2020-1-2", "2020-01-02"),
        ("2020/01/02", "2020-01-02"),
        ("2020.01.02", "2020-01-02"),
        ("20200102", "2020-01-02"),
        ("02.01.2020", "2020-01-02"),
        ("2.1.20", "2020-01-02"),
        ("13/01/2020", "2020-01-13"),
        ("01/13/2020", "2020-01-13"),
        ("13-01-2020", "2020-01-13"),
        ("2-Jan-2020", "2020-01-02"),
        ("02Jan2020", "2020-01-02"),
        ("2 January 2020", "2020-01-02"),
        ("Jan 2, 2020", "2020-01-02"),
        ("January 2, 2020", "2020-01-02"),
        ("2020-01-02 03:04", "2020-01-02 03:04"),
        ("2020-01-02 03:04:05 UTC", "2020-01-02 03:04:05 UTC"),
        ("2020-01-02T03:04:05.123Z", "2020-01-02T03:04:05.123Z"),
        ("2020-01-02T03:04:05+0100", "2020-01-02T03:04:05+0100"),
        ("2020/01/02 03:04:05,5", "2020-01-02 03:04:05.500000"),
        ("02.01.2020 3:04", "2020-01-02 03:04"),
        ("1/13/2020 3:04 PM", "2020-01-13 15:04"),
        ("1/13/20 12:04:05 am", "2020-01-13 00:04:05"),
        ("20200102T030405", "2020-01-02 03:04:05"),
        ("202001020304", "2020-01-02 03:04"),
        ("2020-01-02T03", "2020-01-02T03"),
        ("1949-01", "1949-01"),
        ("1949/1", "1949-01"),
        ("01/1949", "1949-01"),
        ("194901", "1949-01"),
        ("1949M01", "1949-01"),
        ("Jan 1949", "1949-01"),
        ("January-1949", "1949-01"),
        ("1949 Jan", "1949-01"),
        ("2020Q3", "2020Q3"),
        ("2020-Q3", "2020Q3"),
        ("Q3 2020", "2020Q3"),
        ("2020-W01", "2020-W01"),
        ("1700", "1700"),
        ("0.1", "0.1"),
        ("1066-10-14", "1066-10-14"),
    ],
)
def test_layouts(cell, text):
    """A time in each usual layout is read, and shown in ISO 8601."""
    assert parse(cell).text == (text,)


def test_instants_are_exact():
    """Clock, fraction, half of the day and zone count, and cells of one column may differ in their clocks."""
    cells = ("2020-01-02", "2020-01-02 03:04", "2020-01-02 03:04:05.25", "2020-01-02T15:04:05")
    expected = [datetime(2020, 1, 2), *(datetime(2020, 1, 2, 3, 4), datetime(2020, 1, 2, 3, 4, 5, 250_000))]
    expected.append(datetime(2020, 1, 2, 15, 4, 5))
    microseconds = [(time - datetime(1970, 1, 1)) // timedelta(microseconds=1) for time in expected]
    assert parse(*cells).values.tolist() == microseconds
    zoned = parse("2020-01-02 03:04+01:00", "2020-01-02 03:04Z", "2020-01-02 03:04-0130")
    assert np.diff(zoned.values).tolist() == [3_600_000_000, 5_400_000_000]


@pytest.mark.parametrize(
    ("cells", "index"),
    [
        (["2020-01-31", "2020-02-30"], 1),
        (["2020-01-31", "2020/02/01"], 1),
        (["2020-01-31 03:00", "2020-02-01 03:00Z"], 1),
        (["20200101", "2020013"], 1),
        (["20200101", "20201301"], 1),
        (["2020Q1", "2020Q5"], 1),
        (["2020-W01", "2020-W54"], 1),
        (["2020-01", "2020-13"], 1),
        (["1", "two"], 1),
        (["1", ""], 1),
        (["2020-01-31", ""], 1),
        (["Monday"], 0),
        (["2020-13-45"], 0),
        (["13/13/2020"], 0),
        (["01/02/2020", "13/01/2020", "01/13/2020"], 2),
    ],
)
def test_cells_that_are_no_times(cells, index):
    """A cell of another kind, or a day that no calendar has, is an error of that cell."""
    with pytest.raises(ValueError) as error:
        parse(*cells)
    assert error.value.index == index


def test_day_or_month_first(read_times):
    """Only a number above 12 or the setting tells the day from the month; points stand behind days."""
    days = ["01/02/2020", "02/02/2020", "03/02/2020"]
    with pytest.raises(DataError) as error:
        read_times(days)
    assert "line 2, column when: '01/02/2020' begins with the day or with the month" in str(error.value)
    assert "day_first=true or day_first=false does" in str(error.value)
    assert read_times(days, day_first=True).times == ("2020-02-01", "2020-02-02", "2020-02-03")
    assert read_times(days, day_first=False).times == ("2020-01-02", "2020-02-02", "2020-03-02")
    assert read_times([*days, "13/02/2020"], missing="drop").times[0] == "2020-02-01"
    found = read_times([day.replace("/", ".") for day in days])
    assert found.times[0] == "2020-02-01" and "dates as DD.MM.YYYY" in found.notes
