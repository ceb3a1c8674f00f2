"""Prints tables of names and figures on standard output."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightkit._util.printable import printable


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints a short table of names and values, which may be somebody else's.

    Args:
        title: stands above the table.
        rows: values by name.
    """
    # As texts: in plain strings rich looks for its markup.
    table = Table(title=Text(printable(title), style="table.title"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    # Paths must come out whole, to be copied.
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)
