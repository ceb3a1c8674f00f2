"""Series: reading a column, the split in time, windows, scale and naive forecasts."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from lightkit.data import CO2, Series, Sunspots
from lightkit.data.columns import read_column
from lightkit.errors import DataError


@pytest.fixture
def table(tmp_path):
    """Returns a function that writes a CSV file."""

    def write(text):
        (tmp_path / "values.csv").write_text(text)
        return tmp_path / "values.csv"

    return write


def series(table, values, **options):
    options = {"history": 3, "horizon": 2, "validation_size": 6, "test_size": 6, **options}
    data = Series(path=str(table("x\n" + "\n".join(map(str, values)) + "\n")), **options)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        ("x\n", {}, "has a header and no rows"),
        ("1,2\n3,4\n", {}, "has no header: line 1 must name the columns, it has 1, 2"),
        ("t,x\n1,2\n3\n", {}, "line 3: 1 cells, but the header has 2"),
        ("t,x\n1,2\n\n3,4\n", {}, "line 3: 0 cells, but the header has 2"),
        ("t,x\na,2\nb,two\n", {}, "line 3, column x: 'two' is not a number"),
        ("x\n1\n1_000\n", {}, "line 3, column x: '1_000' is not a number"),
        ("x\n1\nnan\n", {}, "column x: line 3 is a gap, 'nan' (1 in all)"),
        ("x\n1\n-inf\n", {}, "line 3, column x: '-inf' is not finite"),
        ("x\n1\n\n2\n", {}, "column x: line 3 is empty"),
        ("t,x\na,1\nb,\nc,2\n", {}, "column x: line 3 is empty (1 in all); missing=interpolate fills gaps"),
        ("t,x\na,1\nb,\n", {"missing": "interpolate"}, "column x: line 3 is empty, and a gap at an end"),
        ("t,x\na,\nb,1\n", {"missing": "guess"}, "missing must be one of error, interpolate, drop"),
        ("t,x\n1,2\n", {}, "has the numeric columns t, x: choose one with column=NAME; the columns are t, x"),
        ("t,x\na,b\n", {}, "has no numeric column: choose one with column=NAME; the columns are t, x"),
        ("t,x\na,1\n", {"column": "y"}, "has no column 'y'; it has t, x"),
        ("x,x\n1,1\n", {"column": "x"}, "has 2 columns of the name 'x'"),
        ("t,x\n2,1\n1,1\n3,1\n", {"time_column": "t"}, "column t, line 3: 1 comes before the line above it"),
        ("t,x\n1,1\n2,1\n2,1\n", {"time_column": "t"}, "column t, line 4: 2 is there a second time"),
        ("t,x\n2020-01-02,1\n2020-01-01,1\n2020-01-03,1\n", {"time_column": "t"}, "line 3: 2020-01-01 comes before"),
        (
            "t,x\n20200101,1\n20201301,1\n",
            {"time_column": "t"},
            "line 3, column t: '20201301' is not a time like '20200101'",
        ),
        ("t,x\nMonday,1\n", {"time_column": "t"}, "line 2, column t: 'Monday' is neither a date"),
    ],
)
def test_bad_files(table, text, options, expected):
    """Each error of a file names the file, the line and the column."""
    path = table(text)
    with pytest.raises(DataError) as error:
        read_column(path, **options)
    assert expected in str(error.value)
    assert str(path) in str(error.value) or "missing" in options


def test_missing_and_binary_files(tmp_path):
    """A missing file and a binary file are errors."""
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read: No such file"):
        read_column(tmp_path / "nowhere.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match="is no table: it is a PNG image"):
        read_column(tmp_path / "picture.csv")


def test_reads_quotes_marks_and_dates(table):
    """Quoted names, a byte-order mark, blanks, empty lines at the end and compact dates are read."""
    path = table('\ufeff"day","a, b"\n20200131, 1.5\n20200201,-2e1\n\n\n')
    found = read_column(path, time_column="day")
    assert found.name == "a, b" and found.values.tolist() == [1.5, -20.0]
    assert found.times == ("2020-01-31", "2020-02-01")


def test_gap_becomes_a_straight_line(table):
    """A gap is interpolated between its neighbours, and marked as not measured."""
    found = read_column(table("x\n1\n\n\n7\n"), missing="interpolate")
    assert found.values.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert found.measured.tolist() == [True, False, False, True]


def test_split_in_time_leaks_nothing(table):
    """Targets lie in their own part, no window is missing, and histories come just before."""
    data = series(table, range(30))
    parts = {"train": range(3, 17), "validation": range(18, 23), "test": range(24, 29)}
    for name, origins in parts.items():
        windows = getattr(data, name)
        assert windows.origins.tolist() == list(origins), name
        # The value of a row is its index, which shows where a window comes from.
        assert windows.target.tolist() == [[o, o + 1] for o in origins]
        assert windows.history.squeeze(2).tolist() == [[o - 3, o - 2, o - 1] for o in origins]
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([target for _, target in batches])[:, 0].tolist()) == list(range(3, 17))


def test_what_comes_later_changes_nothing_in_training(table):
    """Later values change neither the training windows nor their scales, also next to a gap."""
    values = [*range(15), 3, "", "", 9, *range(11)]
    first = series(table, values, missing="interpolate")
    second = series(table, [*values[:18], *(500 + i * i for i in range(12))], missing="interpolate")
    assert not torch.equal(first.series.values[:18], second.series.values[:18])
    for name in ("history", "target", "origins"):
        assert torch.equal(getattr(first.train, name), getattr(second.train, name))
    for relative in (False, True):
        assert first.scale(relative) == second.scale(relative)


def test_no_target_is_invented(table):
    """A window with an interpolated value in its target or at the end of its history is left out; others stay."""
    data = series(table, [*range(8), "", *range(9, 30)], missing="interpolate")
    assert data.train.origins.tolist() == [3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16]


def test_scales_of_the_training_part(table):
    """The scale is mean and deviation of the measured values, or relative the error of the naive forecast."""
    data = series(table, [*(i * i for i in range(18)), *[0] * 12])
    values = torch.arange(18, dtype=torch.float64) ** 2
    assert data.scale() == (values.mean(), values.std(correction=0))
    center, scale = data.scale(relative=True)
    changes = torch.tensor([[values[o + k] - values[o - 1] for k in (0, 1)] for o in range(3, 17)])
    assert center == 0
    torch.testing.assert_close(scale, changes.square().mean().sqrt().double())


def test_simplest_rules_by_hand(table):
    """The errors of both naive forecasts on two test windows equal those computed by hand."""
    values = [*range(12), 10, 20, 30, 13, 25]
    data = series(table, values, season=2, validation_size=3, test_size=3)
    # Windows: 11 10 20 -> 30 13, and 10 20 30 -> 13 25. The last value is 20 and 30; the last season 10 20 and 20 30.
    assert data.test.target.tolist() == [[30.0, 13.0], [13.0, 25.0]]
    found = data.baselines()
    assert found["naive_mae"] == pytest.approx((10 + 7 + 17 + 5) / 4)
    assert found["naive_rmse"] == pytest.approx(((100 + 49 + 289 + 25) / 4) ** 0.5)
    assert found["seasonal_naive_mae"] == pytest.approx((20 + 7 + 7 + 5) / 4)
    assert found["seasonal_naive_rmse"] == pytest.approx(((400 + 49 + 49 + 25) / 4) ** 0.5)


def test_season_shorter_than_the_horizon_repeats(table):
    """The seasonal forecast repeats the season, and is left out without a season."""
    data = series(table, range(30), season=2, horizon=5)
    assert data.seasonal_naive(data.test)[0].tolist() == [22.0, 23.0, 22.0, 23.0, 22.0]
    assert series(table, range(30)).baselines().keys() == {"naive_mae", "naive_rmse"}


def test_shares_and_counts(table):
    """Sizes of parts may be shares of the series."""
    data = series(table, range(30), validation_size=0.2, test_size=0.2)
    assert data.test.origins.tolist() == list(range(24, 29))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"history": 0}, "history must be at least 1"),
        ({"season": 4}, "history is 3, which must hold at least one season of 4"),
        ({"validation_size": 0}, "validation_size must be a share below 1 or a whole number"),
        ({"test_size": 1.5}, "test_size must be a share below 1 or a whole number"),
        ({"test_size": 1}, "of 30 values the test part has 1, too few for one window"),
        ({"test_size": 25}, "the training part has 0, too few"),
        ({"history": 40}, "history=40 and horizon=2 come to 42"),
    ],
)
def test_sizes_that_leave_nothing(table, options, expected):
    """The error of wrong sizes or of a part without a window has the numbers."""
    with pytest.raises(DataError, match=expected):
        series(table, range(30), **options)


@pytest.mark.parametrize("relative", [False, True])
def test_constant_series(table, relative):
    """A constant series has no scale and is an error."""
    with pytest.raises(DataError, match="column x does not vary in the training part"):
        series(table, [0.1] * 20 + list(range(10))).scale(relative)


SHAPES = {"steps": [0, 1, 1, 3, 0, 2], "wave": [0, 1, 2, 3, 2, 1]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("level", "change"), [(0, 1e-31), (0, 1e-200), (0, 1e200), (2.4e12, 0.2), (1e15, 0.125), (7, 1)]
)
def test_scale_of_any_units(table, level, change, shape):
    """The scale is that of exact arithmetic where squares leave float64, or a change is small beside the level."""
    exact = [Fraction(level + change * step) for step in SHAPES[shape] * 5]
    data = series(table, [level + change * step for step in SHAPES[shape] * 5])
    training = exact[: len(data._training_values)]
    mean = sum(training) / len(training)
    variance = sum((value - mean) ** 2 for value in training) / len(training)
    center, scale = data.scale()
    assert float(center) == pytest.approx(float(mean), rel=1e-15)
    # Fractions have no roots: the numbers are brought near 1.
    unit = Fraction(change)
    assert float(scale) / change == pytest.approx(math.sqrt(variance / unit**2), rel=1e-12)
    center, scale = data.scale(relative=True)
    pairs = [(exact[o - 1], exact[o + step]) for o in data.train.origins.tolist() for step in range(data.horizon)]
    squares = sum(((after - before) / unit) ** 2 for before, after in pairs) / len(pairs)
    assert center == 0 and float(scale) / change == pytest.approx(math.sqrt(squares), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e308] * 10 + [-1e308] * 20, "column x is from -1e.308 to 1e.308 in the training part, which is more than"),
        ([0.0] + [1.0] * 29, "no target of column x differs from the last value .* set task.relative=false"),
    ],
)
def test_a_series_without_a_scale(table, values, expected):
    """A series whose differences are all zero or beyond float64 is an error, and none that says it does not vary."""
    with pytest.raises(DataError, match=expected):
        series(table, values).scale(relative=True)


def test_series_of_statsmodels():
    """Both series are complete, without an import of statsmodels or pandas."""
    code = (
        "import sys; from lightkit.data import CO2, Sunspots\n"
        "for data in (CO2(history=8, horizon=4), Sunspots(history=8, horizon=4)): data.setup()\n"
        "sys.exit(' '.join({'pandas', 'statsmodels'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # sys.exit writes a string to standard error.
    assert result.stderr.strip() == ""
    carbon, spots = CO2(history=8, horizon=4).read(), Sunspots(history=8, horizon=4).read()
    assert len(carbon) == 2284 and int((~carbon.measured).sum()) == 59
    assert carbon.times[0] == "1958-03-29" and carbon.values[-1] == 371.5
    assert len(spots) == 309 and spots.times[0] == "1700" and spots.values[:3].tolist() == [5.0, 11.0, 16.0]
    with pytest.raises(DataError, match="column co2: line 8 is empty"):
        CO2(missing="error", history=8, horizon=4).setup()


def test_tables_beyond_all_use(table, monkeypatch):
    """A cell takes many times its bytes: cells are counted while they are read."""
    monkeypatch.setattr("lightkit.data.tables.grid.MAX_CELLS", 100)
    assert len(read_column(table("x\n" + "1\n" * 40))) == 40
    with pytest.raises(DataError, match="has more than 100 cells"):
        read_column(table("x\n" + "1\n" * 60))
    with pytest.raises(DataError, match="has more than 100 cells"):
        read_column(table(",".join("x" * 200)))


def test_files_of_the_system_that_go_on_for_ever():
    """System files of size 0 are empty; devices are rejected."""
    with pytest.raises(DataError, match="is empty"):
        read_column("/proc/self/pagemap")
    with pytest.raises(DataError, match="is a device, and must be a regular file"):
        read_column("/dev/zero")
