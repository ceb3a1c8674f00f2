"""The comparison of a compressed model with the dense one: as tables, as JSON and as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkit._util.numbers import format_number, format_percentage
from lightkit.app import run_files
from lightkit.app.compression_outcome import CompressionOutcome, outcome_tables
from lightkit.app.console import print_table
from lightkit.app.pages.document import escape, html_table, render_page

# The name of the accuracy among metrics.
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Comparison:
    """The outcome of a compression.

    Attributes:
        directory: the directory of the results.
        columns: the values of each model by name of the value, by the name of the model: "dense", "dense, trained on"
            and "compressed".
        trials: the shares of multiply-adds that ``max_drop`` has tried, with the drop of accuracy of each.
        outcome: what the compression has made of the layers; None without a callback of compression.
    """

    directory: Path
    columns: dict[str, dict[str, Any]]
    trials: list[dict[str, float]]
    outcome: CompressionOutcome | None


def content(comparison: Comparison, path: Path, epochs: int) -> dict[str, Any]:
    """Returns the comparison as plain values.

    Args:
        comparison: the comparison.
        path: the checkpoint of the dense model.
        epochs: the number of epochs of each training.
    """
    outcome = comparison.outcome
    return {
        "ckpt_path": str(path),
        "epochs": epochs,
        "models": comparison.columns,
        "trials": comparison.trials,
        "layers": {} if outcome is None else outcome.layers,
        "widths": {} if outcome is None else outcome.widths,
        "zeros": {} if outcome is None else outcome.zeros,
        "environment": run_files.environment(),
    }


def rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Returns the rows of the comparison: the name of a value and its text for each model."""
    columns = list(comparison.columns.values())
    names = list(dict.fromkeys(name for column in columns for name in column if name != "interval"))
    return [(name, [_text(name, column) for column in columns]) for name in names]


def _text(name: str, column: dict[str, Any]) -> str:
    value = column.get(name)
    if value is None:
        return ""
    if name == f"test/{ACCURACY}":
        interval = column.get("interval")
        around = "" if interval is None else f" ({' to '.join(format_percentage(round(x, 4)) for x in interval)})"
        return format_percentage(round(value, 4)) + around
    return f"{value:,}" if isinstance(value, int) else format_number(value)


def print_comparison(comparison: Comparison) -> None:
    """Prints the comparison as tables, and the paths of the results."""
    for index, name in enumerate(comparison.columns):
        print_table(name, {row: texts[index] for row, texts in rows(comparison) if texts[index]})
    directory = comparison.directory
    places = {
        "checkpoint": directory / "checkpoints" / "best.ckpt",
        "small checkpoint": directory / "deploy.ckpt",
        "report": directory / "report.html",
    }
    print_table("results", {name: os.path.relpath(place) for name, place in places.items()})


def page(comparison: Comparison, path: Path, epochs: int) -> str:
    """Returns the comparison as a page, in HTML; the arguments are those of `content`."""
    head = "".join(f"<th>{escape(name)}</th>" for name in comparison.columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
        for name, texts in rows(comparison)
    )
    note = (
        f"<p>The compressed model and the dense one that was trained on had {epochs} epochs from {escape(str(path))}. "
        "The interval of an accuracy has 95 %. Latencies are medians of calls in turn on this machine.</p>"
    )
    tables: dict[str, str] = {}
    if comparison.trials:
        tried = [(str(trial["keep_macs"]), format_number(trial["drop"])) for trial in comparison.trials]
        tables["Search"] = html_table(("keep_macs", "drop of accuracy in validation"), tried)
    if comparison.outcome is not None:
        tables |= outcome_tables(comparison.outcome)
    rest = "".join(f"<section><h2>{title}</h2>{table}</section>" for title, table in tables.items())
    section = f'<section><h2>Dense and compressed</h2><div class="scroll"><table><tr><th></th>{head}</tr>{body}</table>'
    return render_page("compression", path.name, f"{section}</div>{note}</section>{rest}")
