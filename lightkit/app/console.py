"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightkit._util.printable import printable

# A column of names up to this number of characters keeps its width beside long values.
_MAX_UNFOLDED = 40


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints a table of names and values; escapes control characters and rich's markup in both.

    Args:
        title: the line above the table.
        rows: the values by name.
    """
    # rich parses markup in a str and none in a Text.
    table = Table(title=Text(printable(title), style="table.title"), show_header=False, title_justify="left")
    # A path that a user wants to copy must not be cut.
    is_short = max(map(len, rows), default=0) <= _MAX_UNFOLDED
    table.add_column(style="bold", no_wrap=is_short, overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)
