"""The regular step of times, missing times and what becomes of them, and the order of the rows."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightkit.data.columns import read_column
from lightkit.data.tables.times import Times
from lightkit.data.time_steps import find_steps
from lightkit.errors import DataError


def days(*arguments, form="%Y-%m-%d", **options):
    return pandas.date_range(*arguments, **options).strftime(form).tolist()


REGULAR = {
    "days": (days("2020-01-01", periods=60), "1 day"),
    "weeks": (days("2020-01-05", periods=60, freq="W"), "7 days"),
    "iso weeks": ([f"2020-W{week:02d}" for week in range(1, 53)], "7 days"),
    "months": (days("1949-01-01", periods=60, freq="MS"), "1 month"),
    "names of months": (days("1949-01-01", periods=60, freq="MS", form="%Y-%m"), "1 month"),
    "month ends": (days("2019-12-31", periods=60, freq="ME"), "1 month"),
    "the 30th": ([*days("2020-01-30", periods=1), "2020-02-29", "2020-03-30", "2020-04-30", "2020-05-30"], "1 month"),
    "last weekdays": (days("2020-01-31", periods=60, freq="BME"), "1 month"),
    "first weekdays": (days("2020-01-01", periods=60, freq="BMS"), "1 month"),
    "quarters": ([f"{year}Q{quarter}" for year in range(2000, 2010) for quarter in (1, 2, 3, 4)], "1 quarter"),
    "quarter ends": (days("2000-03-31", periods=40, freq="QE"), "1 quarter"),
    "leap years": (days("1949-02-28", periods=40, freq=pandas.DateOffset(years=1)), "1 year"),
    "years": ([str(year) for year in range(1900, 1950)], "1"),
    "every fifth year": ([str(year) for year in range(1700, 1950, 5)], "5"),
    "weekdays": (days("2020-01-01", periods=60, freq="B"), "1 working day"),
    "Sunday to Thursday": (
        pandas.bdate_range("2020-01-01", periods=60, freq="C", weekmask="Sun Mon Tue Wed Thu").strftime("%Y-%m-%d"),
        "1 working day",
    ),
    "tenths": ([f"{row / 10:.1f}" for row in range(60)], "0.1"),
    "floats of tenths": ([repr(row * 0.1) for row in range(60)], "0.1"),
    "rounded thirds": ([f"{row / 3:.2f}" for row in range(60)], None),
    "late by a second": ([f"2020-01-01 {row:02d}:00:0{row % 2}" for row in range(24)], "1 hour"),
    "quarter hours": (days("2020-01-01", periods=60, freq="15min", form="%d.%m.%Y %H:%M"), "15 minutes"),
    "milliseconds": (days("2020-01-01", periods=60, freq="100ms", form="%Y-%m-%dT%H:%M:%S.%fZ"), None),
    "seconds since 1970": ([str(1577836800 + 60 * row) for row in range(60)], "60"),
}


def local(zone, begin, count, freq, form="%Y-%m-%d %H:%M"):
    times = pandas.date_range(begin, periods=count, freq=freq, tz="UTC").tz_convert(zone)
    return times.strftime(form).tolist() if form else [str(time) for time in times]


REGULAR |= {
    "hours of Berlin": (local("Europe/Berlin", "2020-01-01", 24 * 320, "h"), "1 hour"),
    "quarter hours of New York": (local("America/New_York", "2020-03-01", 96 * 30, "15min"), "15 minutes"),
    "hours of Sydney": (local("Australia/Sydney", "2020-09-01", 24 * 300, "h"), "1 hour"),
    "hours of Berlin with offsets": (local("Europe/Berlin", "2020-01-01", 24 * 320, "h", None), "1 hour"),
    "days of Berlin with offsets": (
        [str(day) for day in pandas.date_range("2020-01-01", periods=320, tz="Europe/Berlin")],
        "1 day",
    ),
}


@pytest.mark.parametrize("name", REGULAR)
def test_regular_times(read_times, name):
    """Each kind of regular times is regular; one that is left out is missing, and interpolation brings it back."""
    times, step = REGULAR[name]
    whole = read_times(times)
    assert len(whole) == len(times) and whole.measured.all()
    if len(times) < 10 or name in ("weekdays", "Sunday to Thursday"):
        return
    with pytest.raises(DataError) as error:
        read_times(times, leave_out=(6, 7))
    assert "is missing next to line 7 (2 in all; the times are" in str(error.value)
    assert step is None or f"the times are {step} apart" in str(error.value)
    assert "missing=interpolate fills gaps, missing=drop leaves them out" in str(error.value)
    filled = read_times(times, leave_out=(6, 7), missing="interpolate")
    assert filled.values.tolist() == pytest.approx([row + 0.5 for row in range(len(times))])
    assert filled.measured.tolist() == [row not in (6, 7) for row in range(len(times))]
    assert len(filled.times) == len(times) and "2 missing times interpolated" in filled.notes
    dropped = read_times(times, leave_out=(6, 7), missing="drop")
    assert len(dropped) == len(times) - 2 and dropped.measured.all()


def test_missing_month_and_day_are_named(read_times):
    """The name of an inserted time is that of the calendar, also at the ends of months and across weekends."""
    months = days("2019-12-31", periods=60, freq="ME")
    assert read_times(months, leave_out=(2,), missing="interpolate").times[2] == "2020-02-29"
    assert read_times(months[2:], leave_out=(12,), missing="interpolate").times[12] == "2021-02-28"
    weekdays = days("2020-01-01", periods=400, freq="B")
    filled = read_times(weekdays, leave_out=range(100, 220), missing="interpolate")
    assert filled.times == tuple(weekdays) and int((~filled.measured).sum()) == 120


def test_a_long_gap_is_an_error(read_times):
    """A gap of 120 days is an error that counts them, without any setting."""
    with pytest.raises(DataError, match=r"2020-04-10 is missing next to line 101 \(120 in all; the times are 1 day"):
        read_times(days("2020-01-01", periods=400), leave_out=range(100, 220), time_column=None)


def test_holidays_are_no_gaps(read_times):
    """A series of weekdays stands as it is, with one line that counts the holidays; a long gap is one still."""
    weekdays = days("2020-01-01", periods=260, freq="B")
    found = read_times(weekdays, leave_out=(7, 70, 71, 72, 73, 74, 75, 76, 77, 200))
    assert len(found) == 250 and "working days as they stand, 10 holidays left out" in found.notes
    with pytest.raises(DataError, match=r"\(11 in all; the times are 1 working day apart"):
        read_times(weekdays, leave_out=(7, *range(70, 81)))
    # Every fourth weekday is no holiday.
    with pytest.raises(DataError, match=r"\(23 in all"):
        read_times(days("2020-01-01", periods=100, freq="B"), leave_out=range(1, 90, 4))


def test_trading_hours_are_no_gaps(read_times):
    """Minutes of trading hours stand as they are, also with a break at noon; nights at random hours are gaps."""
    sessions = [("09:30", "11:30"), ("13:00", "15:00")]
    dates = days("2020-01-06", periods=8, freq="B")
    times = [
        time
        for date in dates
        for begin, end in sessions
        for time in days(f"{date} {begin}", f"{date} {end}", freq="5min", form="%Y-%m-%d %H:%M")
    ]
    found = read_times(times)
    assert len(found) == len(times) and "sessions of times 5 minutes apart as they stand" in found.notes
    with pytest.raises(DataError, match="is missing next to line 4"):
        read_times(days("2020-01-06", periods=200, freq="h", form="%Y-%m-%d %H:%M"), leave_out=(3, 40, 77, 120, 121))


@pytest.mark.parametrize(
    ("times", "note"),
    [
        (["2020-01-01 00:00", "2020-01-01 00:07", "2020-01-01 02:00", "2020-01-03 02:00"], "7 minutes to 2 days"),
        (["0", "1", "10", "100", "1e300"], "1 to 1e+300"),
        (["0", "1", "2", "3", "1000000000000000"], "1 to 1e+15"),
        (["-1.7e308", "0", "1.7e308"], "1.7e+308 to 1.7e+308"),
        (["2020-01-01", "2020-01-02", "2020-01-05"], "1 day to 3 days"),
        (["2020-01", "2020-02", "2021-05", "2022-09"], "1 to 16 months"),
    ],
)
def test_times_without_a_step(read_times, times, note):
    """Times without a regular step are taken as they stand, with the range of steps in one line."""
    found = read_times(times)
    assert len(found) == len(times)
    assert f"times without a regular step, {note} apart, taken as evenly spaced" in found.notes


def test_newest_first(read_times):
    """A file whose newest row comes first is turned around, and its lines are those of the file."""
    times = days("2020-01-01", periods=40)[::-1]
    found = read_times(times)
    assert found.times == tuple(times[::-1]) and found.values.tolist() == [row + 0.5 for row in range(40)][::-1]
    assert "rows from the last to the first" in found.notes
    with pytest.raises(DataError, match="2020-02-04 is missing next to line 7"):
        read_times(times, leave_out=(5,))
    autumn = local("Europe/Berlin", "2020-10-20", 480, "h")[::-1]
    assert read_times(autumn).times == tuple(autumn[::-1])


def test_order_is_checked(read_times):
    """Neither a second time nor one out of order is accepted, except where a clock is put back."""
    with pytest.raises(DataError, match="line 4: 2020-01-02 is there a second time"):
        read_times(["2020-01-01", "2020-01-02", "2020-01-02", "2020-01-03"])
    with pytest.raises(DataError, match="line 4: 2020-01-01 comes before the line above it"):
        read_times(["2020-01-02", "2020-01-03", "2020-01-01", "2020-01-04"])
    # A Wednesday in summer, on which no clock is changed.
    with pytest.raises(DataError, match="is there a second time"):
        read_times([f"2020-07-01 {hour:02d}:00" for hour in (0, 1, 2, 2, 3, 4)])


def test_times_are_found(read_times, tmp_path):
    """The only column of dates in order gives the times, with a line that says so; any other is left alone."""
    found = read_times(days("2020-01-01", periods=5), time_column=None)
    assert found.times[0] == "2020-01-01" and "times from column when" in found.notes
    unordered = read_times(["2020-01-01", "2020-01-03", "2020-01-02"], time_column=None)
    assert unordered.times is None and "rows in their order, which is not that of column when" in unordered.notes
    broken = read_times(["2020-01-01", "2020-01-03", "total"], time_column=None)
    assert broken.times is None and "rows in their order, since column when has 'total'" in broken.notes
    (tmp_path / "years.csv").write_text("Year,x\n1999,5\n2000,6\n2001,7\n2002,8\n2004,9\n")
    with pytest.raises(DataError, match="column Year: 2003 is missing next to line 5"):
        read_column(tmp_path / "years.csv")
    (tmp_path / "two.csv").write_text("a,b,x\n2020-01-01,2020-01-01,1\n2020-01-02,2020-01-02,2\n")
    two = read_column(tmp_path / "two.csv")
    assert two.times is None and two.notes == ("rows in their order, since a and b have dates",)


@given(
    count=st.integers(8, 60),
    holes=st.sets(st.integers(1, 58), max_size=20),
    step=st.sampled_from([1, 7, 60, 3600, 86400, 604800]),
)
def test_holes_in_a_grid_are_found_exactly(count, holes, step):
    """Whichever few times are left out of a grid, these are the missing ones."""
    rows = [row for row in range(count) if row not in holes or row == count - 1]
    steps = np.diff(rows)
    if len(rows) < 4 or (steps == 1).mean() <= 0.5:
        return
    # A Wednesday at noon: no grid of these steps skips weekends alone.
    values = (np.array(rows) * step + 1_577_880_000) * 1_000_000
    found = find_steps(Times("instant", values, tuple(map(str, rows)), "m"))
    if found.note is None:
        assert found.positions.tolist() == [row - rows[0] for row in rows]
        missing = sorted(set(range(rows[-1])) - set(rows))
        assert found.filled.tolist() == [(row * step + 1_577_880_000) * 1_000_000 for row in missing]
