"""Numbers and gaps as people write them: read exactly, or an error of the cell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightkit.data.tables.numbers import parse_numbers
from lightkit.errors import DataError


def parse(*cells, decimal=None, points_are_decimal=True):
    return parse_numbers(np.array(cells, dtype=object), decimal, points_are_decimal)


@pytest.mark.parametrize(
    ("cells", "values", "note"),
    [
        (["3,5", "4"], [3.5, 4.0], "decimal commas"),
        (["1.234,5", "2"], [1234.5, 2.0], "thousands grouped by points"),
        (["1,234.5", "2,345"], [1234.5, 2345.0], "thousands grouped by commas"),
        (["1,234,567", "2,345"], [1234567.0, 2345.0], "thousands grouped by commas"),
        (["12,34,567.5"], [1234567.5], "thousands grouped by commas"),
        (["0,234", "1,234"], [0.234, 1.234], "decimal commas"),
        (["1234,567", "1,234"], [1234.567, 1.234], "decimal commas"),
        (["1 234", "1 234 567,5"], [1234.0, 1234567.5], "thousands grouped by spaces"),
        (["1\u00a0234,5"], [1234.5], "thousands grouped by spaces"),
        (["1\u202f234,567"], [1234.567], "thousands grouped by spaces"),
        (["1'234.5", "1’234"], [1234.5, 1234.0], "thousands grouped by apostrophes"),
        (["$5", "-$1,234.50", "$-7"], [5.0, -1234.5, -7.0], "numbers in $"),
        (["5 €", "6,5€"], [5.0, 6.5], "numbers in €"),
        (["5%", "-1.5 %"], [5.0, -1.5], "numbers in %"),
        (["(5)", "6", "(1,234.5)"], [-5.0, 6.0, -1234.5], "negative numbers in parentheses"),
        (["5-", "6"], [-5.0, 6.0], "minus signs behind the numbers"),
        (["−5", "+6"], [-5.0, 6.0], None),
        (["1e3", "1,5E+03"], [1000.0, 1500.0], "decimal commas"),
        ([".5", "5."], [0.5, 5.0], None),
    ],
)
def test_conventions(cells, values, note):
    """A column in a convention of some country or program has exactly these values, and says how it was read."""
    found = parse(*cells)
    assert found.values.tolist() == values
    assert note is None or note in found.notes


@pytest.mark.parametrize(
    ("cells", "index", "problem"),
    [
        (["1.5", "3,5"], 1, "is not a number with a decimal point, which '1.5' above has"),
        (["3,5", "1.5"], 1, "is not a number with a decimal comma"),
        (["1", "1,2,3"], 1, "is not a number"),
        (["1", "12,3456,789"], 1, "is not a number"),
        (["1", "1 23"], 1, "is not a number"),
        (["1", "(5"], 1, "is not a number"),
        (["1", "--5x"], 1, "is not a number"),
        (["1", "-5-"], 1, "is not a number"),
        (["5%", "6"], 1, "has no sign %"),
        (["$5", "€6"], 1, "is in €, but cells above are in $"),
        (["1", "#DIV/0!"], 1, "is an error of the spreadsheet"),
        (["1", "1e999"], 1, "is not finite"),
        (["1", "-Infinity"], 1, "is not finite"),
        (["1", "1" * 401 + "x"], 1, "is not a number"),
    ],
)
def test_cells_that_are_no_numbers(cells, index, problem):
    """A cell outside the column's convention is an error of that cell, never another number."""
    with pytest.raises(ValueError) as error:
        parse(*cells)
    assert error.value.index == index
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "gap",
    [
        "",
        "NA",
        "N/A",
        "n/a",
        "#N/A",
        "#NV",
        "nan",
        "NaN",
        "NULL",
        "None",
        "<NA>",
        "-",
        "--",
        "–",
        ".",
        "..",
        "?",
        "\\N",
    ],
)
def test_words_for_no_value(read, gap):
    """Each word for "no value" is a gap: an error with the line and the settings, or filled and marked."""
    content = f"t,x\na,1\nb,{gap}\nc,3\n"
    with pytest.raises(DataError, match=r"column x: line 3 is .*\(1 in all\); missing=interpolate fills gaps"):
        read(content)
    found = read(content, missing="interpolate")
    assert found.values.tolist() == [1.0, 2.0, 3.0] and found.measured.tolist() == [True, False, True]
    dropped = read(content, missing="drop")
    assert dropped.values.tolist() == [1.0, 3.0] and dropped.measured.all()


def written(value, decimal, group):
    """Writes a number with a decimal mark and grouped thousands."""
    whole, _, fraction = f"{abs(value):.4f}".partition(".")
    groups = []
    while len(whole) > 3:
        whole, last = whole[:-3], whole[-3:]
        groups.insert(0, last)
    return ("-" if value < 0 else "") + group.join([whole, *groups]) + decimal + fraction


CONVENTIONS = [(".", ""), (",", ""), (".", ","), (",", "."), (",", " "), (",", "\u00a0"), (".", "\u202f"), (".", "'")]


@pytest.mark.parametrize(("decimal", "group"), CONVENTIONS)
@given(numbers=st.lists(st.integers(-(10**13), 10**13), min_size=1, max_size=8))
def test_a_number_comes_back_from_each_convention(decimal, group, numbers):
    """A decimal fraction of four digits that is written in a convention is read as exactly that float."""
    values = [number / 10**4 for number in numbers]
    assert parse(*(written(value, decimal, group) for value in values)).values.tolist() == values


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_floats_come_back_exactly(values):
    """The shortest text of any float, with a point or a comma, is read as that float."""
    assert parse(*map(repr, values)).values.tolist() == values
    commas = [repr(value).replace(".", ",") for value in values]
    assert parse(*commas, decimal=",").values.tolist() == values


@given(st.text(alphabet="0123456789.,'-+ ()%$eE\u00a0", max_size=12))
def test_no_text_is_read_as_another_number(text):
    """A cell is a number only if its digits, in their order, are those of the value."""
    cell = text.strip()
    try:
        value = parse(cell, decimal=".").values[0]
    except ValueError:
        return
    if not math.isnan(value) and "e" not in cell.lower():
        digits = "".join(c for c in cell if c.isdigit() or c == ".")
        assert abs(value) == float(digits)
