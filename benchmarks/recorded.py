"""Reads the rows that benchmarks have left in results/; imports nothing but the standard library."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

Row = dict[str, str]


def every(name: str) -> list[Row]:
    """Returns all rows of a file in results/, ``name`` without ``.csv``, the oldest first."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def latest(name: str, *key: str, on_gpu: bool = False) -> list[Row]:
    """Returns the last row for each value of the key, in the order in which the values appear first.

    Args:
        name: of the file in results/, without ``.csv``.
        key: columns that tell measurements apart; without any, all rows of the last day and machine are returned.
        on_gpu: whether to take the rows of NVIDIA's devices or those of all others.
    """
    rows = [row for row in every(name) if ("NVIDIA" in row.get("device", "")) == on_gpu]
    if not key:
        return [row for row in rows if all(row[k] == rows[-1][k] for k in ("date", "device", "threads"))]
    return list({tuple(row[column] for column in key): row for row in rows}.values())


def index(rows: list[Row], *key: str) -> dict[tuple[str, ...], Row]:
    """Returns the rows by the values of the key columns."""
    return {tuple(row[column] for column in key): row for row in rows}


def describe_machine(rows: list[Row]) -> str:
    """Returns processor, threads, versions, day and repetitions of rows: what a figure means nothing without."""
    facts = []
    for column, form in (
        ("device", "{}"),
        ("threads", "{} threads"),
        ("torch", "torch {}"),
        ("python", "Python {}"),
        ("date", "{}"),
    ):
        values = list(dict.fromkeys(row[column] for row in rows if row.get(column)))
        if values:
            facts.append(form.format(" and ".join(values)))
    counts = sorted({int(row["n"]) for row in rows if row.get("n")})
    if counts:
        facts.append(f"n = {counts[0]}" if counts[0] == counts[-1] else f"n = {counts[0]} to {counts[-1]}")
    return ", ".join(facts)
