"""Lays rows out as Markdown tables, and registers the function that writes each table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recorded import Row, describe_machine

Table = Callable[[], list[str]]
TABLES: dict[str, Table] = {}


def table(name: str) -> Callable[[Table], Table]:
    """Registers a function as the writer of a table."""

    def register(function: Table) -> Table:
        TABLES[name] = function
        return function

    return register


def layout(header: Sequence[str], body: Sequence[Sequence[object]], source: str, rows: list[Row]) -> list[str]:
    """Returns the lines of a Markdown table, and below it where the figures come from."""
    lines = [line(header), line(["---"] * len(header)), *(line(cells) for cells in body)]
    return [*lines, "", f"Rows: `benchmarks/results/{source}.csv`. {describe_machine(rows)}."]


def line(cells: Sequence[object]) -> str:
    """Returns one line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def fixed(value: str, digits: int) -> str:
    """Returns a recorded number rounded, with commas between thousands; a missing one is a dash."""
    return f"{float(value):,.{digits}f}" if value else "-"


def figures(value: str) -> str:
    """Returns a recorded number with three figures, at least: 9.6, 31.7, 123, 1,448."""
    number = float(value)
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def ratio(peer: Row, own: Row) -> str:
    """Returns how many times as fast ``own`` is as ``peer``, by their milliseconds."""
    return f"{float(peer['milliseconds']) / float(own['milliseconds']):.1f}"
