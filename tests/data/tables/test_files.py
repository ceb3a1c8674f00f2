"""Separators, encodings and headers as programs write them: found, or an error that names the setting."""

from __future__ import annotations

import gzip
import sys

import pytest

from lightkit.data.columns import read_column
from lightkit.data.tables import TableSettings, read_table
from lightkit.errors import DataError


@pytest.mark.parametrize("content", ['t,x\na,"1,234"\nb,"2,500"\n', "t;x\na;1,234\nb;2\n", "t;x\na;1.234\nb;2\n"])
def test_ambiguous_marks_name_the_setting(read, content):
    """A mark that may be a decimal mark or group thousands is an error with the cell and the setting."""
    with pytest.raises(DataError) as error:
        read(content)
    assert "line 2, column x: '1" in str(error.value) and "decimal=comma or decimal=point" in str(error.value)
    values = sorted(read(content, decimal=mark).values[0].item() for mark in ("comma", "point"))
    assert values == [1.234, 1234.0]


def test_another_column_decides(read):
    """A column without a decisive cell has the decimal mark of another one."""
    content = "x;y\n1,234;1,5\n2,345;2,5\n"
    assert read(content, column="x").values.tolist() == [1.234, 2.345]
    assert read(content.replace("1,5", "1,234.5"), column="x").values.tolist() == [1234.0, 2345.0]


def test_plain_files_are_silent(read):
    """A file in UTF-8 with commas and points says nothing, also where a thousandth looks like a thousand."""
    assert read("t,x\na,1.234\nb,2.345\n").notes == ()
    assert read("t,x\na,1.234\nb,2.345\n").values.tolist() == [1.234, 2.345]


@pytest.mark.parametrize(
    ("content", "encoding", "note"),
    [
        ("Name;Größe\na;3,5\nb;4,5\n", "utf-8", "separated by semicolons, decimal commas"),
        ("Name;Größe\na;3,5\nb;4,5\n", "cp1252", "cp1252, separated by semicolons, decimal commas"),
        ("Name\tGröße\na\t3,5\nb\t4,5\n", "utf-16", "UTF-16, separated by tabs, decimal commas"),
        ("\ufeffName\tGröße\na\t3,5\nb\t4,5\n", "utf-16-be", "UTF-16, separated by tabs, decimal commas"),
        ("\ufeffName;Größe\na;3,5\nb;4,5\n", "utf-8", "separated by semicolons, decimal commas"),
        ('Name|Größe\na|"3,5"\nb|"4,5"\n', "utf-8", "separated by pipes, decimal commas"),
        ("sep=;\nName;Größe\na;3,5\nb;4,5\n", "utf-8", "separated by semicolons, decimal commas"),
        ('"sep=;"\r\nName;Größe\r\na;3,5\r\nb;4,5\r\n', "cp1252", "cp1252, separated by semicolons, decimal commas"),
        ("# von Hand\n#\n\nName;Größe\na;3,5\nb;4,5\n", "utf-8", "separated by semicolons, decimal commas"),
        ("# Name;Größe\na;3,5\nb;4,5\n", "utf-8", "separated by semicolons, decimal commas"),
        ('Name,Größe\na,"3,5"\nb,"4,5"\n', "utf-8", "decimal commas"),
        ("Name;Größe\ra;3,5\rb;4,5\r", "utf-8", "separated by semicolons, decimal commas"),
    ],
)
def test_encodings_and_separators(read, content, encoding, note):
    """The file of each program has the same values, and one line says how it was read."""
    found = read(content, encoding)
    assert (found.name, found.values.tolist()) == ("Größe", [3.5, 4.5])
    assert ", ".join(found.notes) == note


def test_gzip(read):
    """A file that gzip has packed is unpacked; one that is cut off is an error."""
    packed = gzip.compress(b"t,x\na,1.5\nb,2.5\n")
    assert read(packed).values.tolist() == [1.5, 2.5]
    with pytest.raises(DataError, match="is a damaged gzip file"):
        read(packed[:-12])


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        ("x\n1,5\n2,5\n", {}, "line 2: 2 cells, but the header has 1; separator=semicolon reads one column of numbers"),
        ("Umsatz\n\na;b\n1;2\n3;4\n", {}, "skip_lines=2 leaves out the lines above line 3"),
        ("a;b\n1;2\n3\n", {}, "line 3: 1 cells, but the header has 2"),
        ('a,b\n1,"2\n3,4\n', {}, "line 2: a quote is not closed"),
        ('a,b\n1,"2"x\n', {}, "line 2: a quote is not closed, or has more text behind it"),
        ("1\n2\n", {}, "no header: line 1 must name the columns, it has 1; header=false takes it for values"),
        (b"x\n1\0\n", {}, "line 2 has a NUL character"),
        ("a,b\n1,2\n".encode("utf-16-le"), {}, "encoding=utf-16-le reads UTF-16"),
        (b"\x8d\xe9\n1\n", {}, "neither in UTF-8 nor in cp1252 (line 1): encoding=NAME names another"),
        (b"a\n\xff\xe9\n", {"encoding": "ascii"}, "is not a text in ascii: line 2 has the byte 0xff"),
        (b"\x01\x02\xff", {}, "has control characters"),
        (b"%PDF-1.4", {}, "is no table: it is a PDF document"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", {}, "a workbook of Excel 97 to 2003; save it as .xlsx"),
        ("<!DOCTYPE html>\n<html>", {}, "is a page of HTML"),
        ("x\n1\n", {"skip_lines": 5}, "has no more lines than skip_lines=5 leaves out"),
        ("", {}, "is empty"),
        (";;\n;;\n", {}, "is empty"),
    ],
)
def test_files_that_need_a_setting_or_another_program(read, content, settings, expected):
    """What cannot be read names the line, and the setting or the format that helps."""
    with pytest.raises(DataError) as error:
        read(content, **settings)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"separator": "a"}, "separator must be comma, semicolon, tab, pipe"),
        ({"separator": "ab"}, "separator must be"),
        ({"separator": ["x"]}, "separator must be"),
        ({"separator": "¦"}, "separator must be"),
        ({"decimal": ";"}, "decimal must be point or comma, got ';'"),
        ({"encoding": "klingon"}, "encoding must be the name of an encoding"),
        ({"encoding": "idna"}, "encoding must be"),
        ({"encoding": "unicode_escape"}, "encoding must be"),
        ({"header": "yes"}, "header must be true, false or null"),
        ({"day_first": 3}, "day_first must be true, false or null"),
        ({"skip_lines": -1}, "skip_lines must be a number of lines"),
    ],
)
def test_wrong_settings(settings, expected):
    """A wrong setting is an error with its name before any file is opened."""
    with pytest.raises(DataError, match=expected):
        TableSettings(**settings)


def test_settings_decide(read):
    """A setting wins over what the file looks like."""
    assert read("Umsatz\na;b\nx;2\ny;4\n", skip_lines=1).values.tolist() == [2.0, 4.0]
    assert read("x\n1,5\n2,5\n", separator="semicolon").values.tolist() == [1.5, 2.5]
    assert read("a#x\nb#2\n", separator="#").values.tolist() == [2.0]
    assert read("name,\u0433\nx,2\n", "cp1251", encoding="cp1251").name == "\u0433"
    assert read("5\n6\n", header=False).values.tolist() == [5.0, 6.0]
    assert read("5\n6\n", header=True).name == "5"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("2020-01-01,5\n2020-01-02,6\n", ("column1", "column2")),
        ("2020-01-01;5;Berlin\n2020-01-02;;Bonn\n", ("column1", "column2", "column3")),
        ("country,1990,1991\nA,1,2\nB,3,4\n", ("country", "1990", "1991")),
        ("country,2020-01,2020-02\nA,1,2\nB,3,4\n", ("country", "2020-01", "2020-02")),
        (",1990,1991\nA,1,2\nB,3,4\n", ("", "1990", "1991")),
        ("1990,1991\nx,y\n", ("1990", "1991")),
        ("day,value\n2020-01-01,5\n", ("day", "value")),
    ],
)
def test_header(tmp_path, content, names):
    """A first line with a date above dates has values; years and months above anything else are names."""
    (tmp_path / "x.csv").write_text(content)
    table = read_table(tmp_path / "x.csv")
    assert table.names == names
    assert len(table) == content.count("\n") - (names[0] != "column1")
    assert any("no header" in note for note in table.notes) == (names[0] == "column1")


def test_a_wide_or_hostile_head_takes_linear_time(read):
    """Millions of empty lines, comments or separators above and below a table are passed over once each."""
    found = read("\n" * 3_000_000 + "#\n" * 300_000 + "t,x\na,1\nb,2\n" + ",\n" * 300_000)
    assert found.values.tolist() == [1.0, 2.0]
    with pytest.raises(DataError, match="line 3300002, column x: 'b' is not a number"):
        read("\n" * 3_000_000 + "#\n" * 300_000 + "x,t\nb,a\n", column="x")


def test_a_path_is_never_an_address(tmp_path, monkeypatch):
    """The name of a file that looks like an address is that of a file: pandas opens nothing itself."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_column("http://localhost/values.csv")
    (tmp_path / "http:").mkdir()
    (tmp_path / "http:" / "x.csv").write_text("x\n1\n")
    assert read_column("http://x.csv").values.tolist() == [1.0]


def test_numbers_of_rows_are_not_the_series(read):
    """A column without a name, as pandas writes the numbers of rows, is not taken for the series."""
    assert read(",x\n0,5\n1,6\n").values.tolist() == [5.0, 6.0]


def test_eight_digits_are_days_only_together(read):
    """A column of large numbers stays one if the first happens to be a day."""
    assert read("x\n20101112\n34567890\n").values.tolist() == [20101112.0, 34567890.0]


def test_without_the_packages_of_the_extra(read, monkeypatch):
    """Without pandas the error says how to install it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DataError, match=r"reading tables needs pandas: .*\[app\]"):
        read("x\n1\n")


def test_too_many_columns(read):
    """Columns are counted before any is made."""
    with pytest.raises(DataError, match="has 100,001 columns, and no more than 100,000 are read"):
        read("x," * 100_000 + "x\n")
