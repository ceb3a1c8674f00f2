"""Which columns become features, what their cells become, and what a checkpoint may say of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import write_customers, write_rows

from lightkit.data import TableDataModule
from lightkit.data.tables import read_table
from lightkit.data.tabular import TableEncoding, frame_to_table
from lightkit.data.tabular.columns import DATE_PARTS, read_column, unique_names
from lightkit.data.tabular.features import MISSING, UNKNOWN, fit_feature
from lightkit.errors import DataError


def module(path, target, **options):
    """Returns a data module after its setup."""
    data = TableDataModule(str(path), target, **options)
    data.setup()
    return data


def feature(data, name):
    return next(found for found in data.fitted.features if found.name == name)


def test_columns_become_features_or_are_left_out_by_name(tmp_path, capsys):
    """Each column of a usual export gets its kind; row numbers, remarks and constants are left out by one line."""
    data = module(write_customers(tmp_path / "c.csv"), "leaves")
    kinds = {found.name: found.kind for found in data.fitted.features}
    assert kinds == {
        "age": "number",
        "plan": "category",
        "region": "category",
        "postcode": "category",
        "since": "date",
    }
    output = capsys.readouterr().out
    assert "left out: id (numbers the rows), remark (all different), country (constant)\n" in output
    assert "predicts leaves (2 classes) from 5 columns; rows: 140 train, 30 validation, 30 test" in output
    assert feature(data, "since").parts == ("year", "month", "weekday") and feature(data, "age").marks_gaps


def test_numbers_are_standardised_by_the_training_part_alone(tmp_path):
    """The mean and the deviation are those of the training rows in float64, and a gap is 0 with a mark of 1."""
    rows = [f"{'' if row % 7 == 3 else 1e9 + row % 13},{row % 2}" for row in range(90)]
    data = module(write_rows(tmp_path / "n.csv", "a,y", rows), "y", time_column=None)
    numbers, _ = data._part("train")
    values, marks = numbers.double().unbind(dim=1)
    assert abs(values[marks == 0].mean()) < 1e-6 and abs(values[marks == 0].std(correction=0) - 1) < 1e-6
    assert (values[marks == 1] == 0).all() and set(marks.tolist()) == {0.0, 1.0}
    raw = [float(row.split(",")[0]) for row in rows if not row.startswith(",")]
    assert feature(data, "a").centers[0] != np.mean(raw)


def test_categories_have_places_for_gaps_and_for_what_is_unknown(tmp_path, capsys):
    """A text of the training has its own index; a gap, a new text and a text of one row have theirs."""
    rows = [f"{('red', 'green', '')[row % 3]},{row % 2}" for row in range(60)]
    data = module(write_rows(tmp_path / "c.csv", "colour,y", rows), "y")
    assert feature(data, "colour").categories == ("green", "red")
    later = write_rows(tmp_path / "later.csv", "more,colour", ["1,red", "2,blue", "3,NA", "4,green", "5,blue"])
    capsys.readouterr()
    _, categories = data.encode(later)
    assert categories[:, 0].tolist() == [3, UNKNOWN, MISSING, 2, UNKNOWN]
    assert capsys.readouterr().out == (
        "later.csv: colour: 2 cells are unknown to the model or rare in its training (blue)\n"
    )
    single = read_column(read_table(write_rows(tmp_path / "s.csv", "c", ["a", "a", "b"])), 0, "c")
    assert fit_feature(single, np.arange(3)).categories == ("a",)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        # Postcodes lose their zeros as numbers.
        (["01234", "99999", "04000"], "category"),
        # Some numbers among texts, as in the numbers of tickets.
        (["113803", "A/5 21171", "PC 17599"], "category"),
        (["TRUE", "FALSE", "TRUE"], "category"),
        (["1.5", "NA", "2"], "number"),
        (["1 %", "2 %", "3 %"], "number"),
        (["2020-01-01", "", "2021-05-05 12:00"], "date"),
        (["20200101", "20210505", "20221231"], "date"),
        (["2020Q1", "2020Q2", "2021Q1"], "date"),
        # A date and a remark are texts.
        (["2020-01-01", "soon", "later"], "category"),
        (["", "NA", "-"], "empty"),
    ],
)
def test_kinds_of_columns(tmp_path, cells, kind):
    """The kind of a column follows all of its cells, not the first one."""
    table = read_table(write_rows(tmp_path / "k.csv", "c,d", [f"{cell},x" for cell in cells]))
    assert read_column(table, 0, "c").kind == kind


def test_a_faulty_number_is_named_and_not_made_a_category(tmp_path):
    """One typing error in a column of numbers must not turn all of its numbers into categories."""
    rows = [f"{row},{row % 2}" for row in range(40)]
    path = write_rows(tmp_path / "f.csv", "a,y", [*rows[:20], "1o,1", *rows[20:]])
    with pytest.raises(DataError, match=r"f\.csv, line 22, column a: '1o' is not a number; categories=\[a\] reads"):
        module(path, "y")
    assert feature(module(path, "y", categories=["a"]), "a").kind == "category"
    mixed = write_rows(tmp_path / "mixed.csv", "a;y", [*(f"{row},5;{row % 2}" for row in range(40)), "1.5;1"])
    with pytest.raises(DataError, match=r"line 42, column a: '1\.5' is not a number with a decimal comma"):
        module(mixed, "y")
    first = write_rows(tmp_path / "first.csv", "a,y", ["bad,1", *rows])
    with pytest.raises(DataError, match="line 2, column a: 'bad' is not a number"):
        module(first, "y")


def test_dates_become_the_parts_that_vary(tmp_path):
    """The parts of a date are those of the calendar; the last of December is the end of its year."""
    cells = ["2020-02-29 06:30", "2021-12-31 18:00", "2021-01-01 00:00"]
    table = read_table(write_rows(tmp_path / "d.csv", "d,e", [f"{cell},1" for cell in cells]))
    values = dict(zip(DATE_PARTS, read_column(table, 0, "d").values.T, strict=True))
    assert values["month"].tolist() == [2, 12, 1] and values["day"].tolist() == [29, 31, 1]
    assert values["weekday"].tolist() == [5, 4, 4] and values["hour"].tolist() == [6.5, 18, 0]
    assert np.allclose(values["year"], [2020.162, 2021.999, 2021], atol=2e-3)


def test_columns_that_the_user_names(tmp_path, capsys):
    """`columns` keeps what would be left out, `ignore` leaves out, and names of numbers are texts on a command line."""
    rows = [f"{row},{row * row % 17},{row % 3},{row % 2}" for row in range(60)]
    path = write_rows(tmp_path / "u.csv", "id,a,2020,y", rows)
    assert [f.name for f in module(path, "y", columns=["id", 2020]).fitted.features] == ["id", "2020"]
    assert [f.name for f in module(path, "y", ignore="a", categories=[2020]).fitted.features] == ["2020"]
    # The command line passes a list whose names have parentheses as one text.
    renamed = write_rows(tmp_path / "r.csv", 'a (cm),"b, c",y', [row.split(",", 1)[1] for row in rows])
    assert [f.name for f in module(renamed, "y", columns='[a (cm), "b, c"]').fitted.features] == ["a (cm)", "b, c"]
    for options, message in [
        ({"columns": ["b"]}, "columns=b: .* has no such column; it has id, a, 2020, y"),
        ({"ignore": ["y"]}, "ignore has y, which is the target"),
        ({"ignore": ["a"], "columns": ["a"]}, "ignore has a, which the model is to read"),
        ({"columns": [[1]]}, r"columns must be a list of names of columns, got \[\[1\]\]"),
        ({"ignore": ["a", 2020]}, "has no column from which y could be predicted"),
    ]:
        with pytest.raises(DataError, match=message):
            module(path, "y", **options)


@pytest.mark.parametrize(
    ("header", "names"),
    [("a,a,y", ["a", "a (2)", "y"]), (",a,y", ["column1", "a", "y"]), ("a (2),a,a", ["a (2)", "a", "a (3)"])],
)
def test_columns_without_a_name_of_their_own_get_one(tmp_path, header, names):
    """Two columns of one name, or of none, are both read, and a later file finds them by the same names."""
    path = write_rows(tmp_path / "n.csv", header, [f"{row % 5},{row % 7},{row % 2}" for row in range(40)])
    assert unique_names(read_table(path)) == names
    assert len(module(path, names[2]).fitted.features) == 2


def test_numbers_of_any_size_stay_finite(tmp_path):
    """The squares of the largest numbers are no infinities, and a later number beyond float32 is no NaN."""
    rows = [f"{(-1) ** row * 1.5e308},{1e-320 * (row % 3)},{row % 2}" for row in range(40)]
    data = module(write_rows(tmp_path / "l.csv", "a,b,y", rows), "y")
    pandas = pytest.importorskip("pandas")
    later = frame_to_table(pandas.DataFrame({"a": [1.7e308, None], "b": [1e308, 0.0]}))
    for numbers in (data._part("train")[0], data.encode(later)[0]):
        assert numbers.isfinite().all()


@pytest.mark.parametrize("sheet", ["workbook", "semicolons"])
def test_files_of_spreadsheets(tmp_path, sheet):
    """A workbook, and a German export with decimal commas, give the numbers that a plain file gives."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"a": [row / 8 for row in range(40)], "b": ["x", "y"] * 20, "y": ["u", "v", "v", "u"] * 10}
    )
    frame.to_csv(tmp_path / "plain.csv", index=False)
    if sheet == "workbook":
        pytest.importorskip("openpyxl")
        frame.to_excel(tmp_path / "other.xlsx", index=False)
        other = tmp_path / "other.xlsx"
    else:
        other = tmp_path / "other.csv"
        frame.to_csv(other, index=False, sep=";", decimal=",", encoding="cp1252")
    one, two = module(tmp_path / "plain.csv", "y"), module(other, "y")
    assert all(map(torch.equal, one._part("train"), two._part("train")))
    # A later file of a single row leaves the decimal mark open.
    if sheet == "semicolons":
        later = write_rows(tmp_path / "later.csv", "a;b", ["1,125;x"])
        assert two.encode(later)[0].item() == one.encode(frame_to_table(frame.iloc[9:10]))[0].item()


def test_frames_are_read_as_files_are(tmp_path):
    """A DataFrame gives the batches of the file that pandas writes of it, whatever the types of its columns."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "float": np.where(np.arange(60) % 6 == 0, np.nan, np.arange(60) / 7),
            "integer": pandas.array([None if row % 9 == 0 else row % 8 for row in range(60)], dtype="Int64"),
            "flag": np.arange(60) % 4 == 0,
            "level": pandas.Categorical(["low", "high", None] * 20),
            "day": pandas.date_range("2024-01-01", periods=60),
            "y": ["a", "b", "b"] * 20,
        }
    )
    frame.to_csv(tmp_path / "f.csv", index=False)
    data = TableDataModule.from_frame(frame, "y")
    data.setup()
    assert [f.kind for f in data.fitted.features] == ["number", "number", "category", "category", "date"]
    assert all(map(torch.equal, data._part("train"), module(tmp_path / "f.csv", "y")._part("train")))


def test_later_tables_have_the_columns_in_any_order(tmp_path):
    """Reordered and further columns change nothing; a missing one, or a text among numbers, is one clear line."""
    path = write_customers(tmp_path / "c.csv")
    data = module(path, "leaves")
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(path, dtype=str)
    frame["new"] = "?"
    frame[frame.columns[::-1]].to_csv(tmp_path / "r.csv", index=False)
    assert all(map(torch.equal, data.encode(path), data.encode(tmp_path / "r.csv")))
    frame.drop(columns=["age", "plan"]).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(DataError, match=r"m\.csv has no column age, plan, from which the model predicts; it has id"):
        data.encode(tmp_path / "m.csv")
    frame.assign(age="old").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"t\.csv, line 2, column age: 'old' is not a number"):
        data.encode(tmp_path / "t.csv")
    # A column that has only gaps there is a column of gaps.
    assert (data.encode(frame_to_table(frame.assign(age=None)))[0][:, 0] == 0).all()


def test_the_encoding_survives_a_checkpoint(tmp_path):
    """The plain form of an encoding gives the same encoding again, and loads without pickled classes."""
    data = module(write_customers(tmp_path / "c.csv"), "leaves")
    torch.save(data.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert TableEncoding.from_plain(state["encoding"]) == data.fitted


PLAIN = {
    "target": "y",
    "classes": ["a", "b"],
    "features": [
        {
            **{"name": "n", "kind": "number", "parts": [], "centers": [0.0], "scales": [1.0], "marks_gaps": True},
            "categories": [],
        },
        {
            **{"name": "c", "kind": "category", "parts": [], "centers": [], "scales": [], "marks_gaps": False},
            "categories": ["x"],
        },
    ],
    "decimal": None,
    "day_first": None,
}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("target",), 5),
        (("classes",), ["a"]),
        (("classes",), ["a", "a"]),
        (("classes",), ["a"] * 2000),
        (("classes",), {"a": 1}),
        (("features",), []),
        (("features",), "x"),
        (("decimal",), "x"),
        (("day_first",), "x"),
        (("further",), 1),
        (("features", 0, "kind"), "category"),
        (("features", 0, "kind"), ["number"]),
        (("features", 0, "kind"), "date"),
        (("features", 0, "scales"), [0.0]),
        (("features", 0, "scales"), [float("nan")]),
        (("features", 0, "scales"), ["1"]),
        (("features", 0, "scales"), [1.0, 1.0]),
        (("features", 0, "centers"), None),
        (("features", 0, "name"), "c"),
        (("features", 0, "marks_gaps"), 1),
        (("features", 0, "further"), 1),
        (("features", 1, "categories"), [1]),
        (("features", 1, "categories"), ["x" * 1000]),
        (("features", 1, "categories"), ["x"] * 20_000),
        (("features", 1), []),
    ],
)
def test_a_strangers_encoding_is_checked(place, value):
    """A checkpoint of a stranger may hold anything in place of an encoding: it is one error, and never another."""
    assert TableEncoding.from_plain(copy.deepcopy(PLAIN)).input_size == 2
    changed = copy.deepcopy(PLAIN)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(DataError, match=r"feature|state of a table"):
        TableDataModule("x.csv", "y").load_state_dict({"encoding": changed})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=6), min_size=12, max_size=40), st.integers(0, 3))
def test_any_cells_are_features_or_one_error(cells, shift):
    """Whatever the cells of a column are, a frame of them is encoded without NaN, or rejected with a DataError."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"a": cells, "b": range(len(cells)), "y": [(row + shift) % 2 for row in range(len(cells))]}
    )
    data = TableDataModule.from_frame(frame, "y", columns=["a", "b"])
    try:
        data.setup()
        numbers = data.encode(frame)[0]
    except DataError:
        return
    assert numbers.isfinite().all() and numbers.shape[1] == data.fitted.input_size
