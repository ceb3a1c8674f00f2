"""Workbooks of Excel: the sheet, dates, stored values and errors, and archives that would take all memory."""

from __future__ import annotations

import zipfile
from datetime import date, datetime

import openpyxl
import pytest

from lightkit.data.columns import read_column
from lightkit.data.tables import TableSettings
from lightkit.errors import DataError

SHEET = "xl/worksheets/sheet1.xml"
ROWS = [["Datum", "Wert"], [date(2020, 1, 1), 1.5], [date(2020, 1, 2), 2], [date(2020, 1, 3), 0.1]]


@pytest.fixture
def read(tmp_path):
    """Returns a function that writes a workbook, edits its parts and reads its column of numbers."""

    def call(*sheets, edit=None, missing="error", **settings):
        path = tmp_path / "b.xlsx"
        book = openpyxl.Workbook()
        book.remove(book.active)
        for number, rows in enumerate(sheets or [ROWS], start=1):
            sheet = book.create_sheet(f"Blatt{number}")
            for row in rows:
                sheet.append(row)
        book.save(path)
        if edit is not None:
            with zipfile.ZipFile(path) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
            edit(parts)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in parts.items():
                    archive.writestr(name, content)
        return read_column(path, missing=missing, settings=TableSettings(**settings))

    return call


def replaced(old, new):
    def edit(parts):
        assert old in parts[SHEET]
        parts[SHEET] = parts[SHEET].replace(old, new)

    return edit


def test_a_workbook_is_a_table(read):
    """Numbers are exact, serial dates are dates, and one line names the sheet."""
    found = read()
    assert (found.name, found.values.tolist()) == ("Wert", [1.5, 2.0, 0.1])
    assert found.times == ("2020-01-01", "2020-01-02", "2020-01-03")
    assert found.notes == ("sheet Blatt1", "times from column Datum")
    hours = read([["when", "x"], *([datetime(2020, 1, 1, hour), hour * 1.25] for hour in range(4))])
    assert hours.times[1] == "2020-01-01 01:00:00" and hours.values.tolist() == [0.0, 1.25, 2.5, 3.75]


def test_texts_are_read_as_in_csv(read):
    """A sheet that holds numbers and dates as texts is read as a CSV file would be."""
    found = read([["Datum", "Wert"], ["31.12.2019", "1.234,5"], ["01.01.2020", "2,5"]])
    assert found.values.tolist() == [1234.5, 2.5] and found.times[0] == "2019-12-31"


def test_the_sheet_is_chosen(read):
    """Empty sheets do not count; several with cells need the setting."""
    assert len(read(ROWS, [])) == 3
    with pytest.raises(DataError, match="has several sheets: Blatt1, Blatt2; sheet=NAME chooses one"):
        read(ROWS, ROWS)
    assert len(read(ROWS, [["x"], [5]], sheet="Blatt2")) == 1
    with pytest.raises(DataError, match="has no sheet 'Blatt3'; it has Blatt1, Blatt2"):
        read(ROWS, ROWS, sheet="Blatt3")


def test_a_table_within_a_sheet(read):
    """Empty rows and columns around a table do not count; a title above it needs the setting."""
    found = read([[], [], [None, "t", "x"], [None, "a", 1], [None, "b", 2], []])
    assert found.values.tolist() == [1.0, 2.0]
    titled = [["Umsatz"], [], ["Monat", "Umsatz"], ["2020-01", 1], ["2020-02", 2]]
    with pytest.raises(DataError, match="row 1: 1 cell, but row 3 has 2; skip_lines=2 leaves out what is above"):
        read(titled)
    assert read(titled, skip_lines=2).times == ("2020-01", "2020-02")


def test_stored_values_alone_count(read):
    """A formula without a stored value is a gap, and an error of Excel is one of its row."""
    formula = [["x"], [1], ["=1+1"], [3]]
    with pytest.raises(DataError, match="column x: row 3 is empty"):
        read(formula)
    assert read(formula, missing="interpolate").values.tolist() == [1.0, 2.0, 3.0]
    stored = replaced(b"<f>1+1</f><v />", b"<f>1+1</f><v>7.5</v>")
    assert read(formula, edit=stored).values.tolist() == [1.0, 7.5, 3.0]
    with pytest.raises(DataError, match="row 3, column x: '#DIV/0!' is an error of the spreadsheet"):
        read([["x"], [1], ["#DIV/0!"]])


def media(parts):
    parts["xl/media/x.bin"] = b"\0" * (513 << 20)


def many_parts(parts):
    parts.update({f"xl/media/{number}": b"" for number in range(10_001)})


def truncated(parts):
    parts[SHEET] = parts[SHEET][:300]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (replaced(b"<worksheet", b'<!DOCTYPE x [<!ENTITY a "b">]><worksheet'), "has a declaration that no workbook"),
        (replaced(b"<worksheet", b"<!--\0--><worksheet"), "has a declaration that no workbook"),
        (media, "the limits of a workbook are"),
        (many_parts, "the limits of a workbook are"),
        (truncated, "is no workbook that can be read: ParseError"),
        (replaced(b'r="B2"', b'r="ZZZZZZZ2"'), "is no workbook that can be read"),
        (replaced(b'r="4"', b'r="400000000"'), "more than 2,000,000 cells or 1,048,576 rows"),
    ],
)
def test_hostile_workbooks(read, monkeypatch, edit, expected):
    """An archive that unpacks to too much, and a part that would grow while it is parsed, is an error at once."""
    monkeypatch.setattr("lightkit.data.tables.grid.MAX_CELLS", 2_000_000)
    with pytest.raises(DataError) as error:
        read(edit=edit)
    assert expected in str(error.value)


def test_a_size_that_a_workbook_declares_is_not_believed(read):
    """A sheet that says it has all rows and columns is read to its last cell."""
    assert len(read(edit=replaced(b'ref="A1:B4"', b'ref="A1:XFD1048576"'))) == 3


def test_other_archives(tmp_path):
    """An archive that is no workbook, and half a workbook, are errors that say so."""
    for name, part, expected in [
        ("a.zip", "a.csv", "is an archive and no workbook of Excel; unpack it"),
        ("a.ods", "mimetype", "is an archive and no workbook of Excel; save it as .xlsx or CSV"),
    ]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(part, "x")
        with pytest.raises(DataError, match=expected):
            read_column(tmp_path / name)
    (tmp_path / "half.xlsx").write_bytes((tmp_path / "a.zip").read_bytes()[:20])
    with pytest.raises(DataError, match="is no workbook that can be read: BadZipFile"):
        read_column(tmp_path / "half.xlsx")
