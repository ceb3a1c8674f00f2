"""Tables in the terminal: every string in them is a text, and none is cut."""

from __future__ import annotations

import pytest

from lightkit.app.console import print_table

NAMES = ["Temp [degC]", "Rate [/s]", "[red]x[/red]", ":smile:", "\\[x]", "[link=x]y", "新 ü"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_no_markup(capsys, name):
    """Title, names and values are shown as they are."""
    print_table(name, {name: name})
    title, _, row, *_ = capsys.readouterr().out.splitlines()
    assert title.strip() == name and row.count(name) == 2


def test_long_names_are_not_cut(capsys, monkeypatch):
    """A path is shown to its end on any terminal, as name and as value."""
    monkeypatch.setenv("COLUMNS", "60")
    path = "/".join(f"folder{i}" for i in range(12))
    print_table("title", {path: path, "short": "\udcff\x1b"})
    out = capsys.readouterr().out
    columns = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    assert ["".join(cell.strip() for cell in cells) for cells in zip(*columns, strict=True)] == [
        f"{path}short",
        f"{path}\\udcff\\x1b",
    ]
