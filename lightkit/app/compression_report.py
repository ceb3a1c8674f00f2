"""The comparison of a compressed model with the dense one: as tables, as JSON and as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
        trials: what ``max_drop`` has tried: the share of multiply-adds, or the mean bits of a weight and whether the
            model was trained, with the drop of accuracy of each.
        outcome: what the compression has made of the layers; None without a callback of compression.
        runtimes: what other runtimes do with the models: see `lightkit.app.runtime_comparison.measure_runtimes`.
    """

    directory: Path
    columns: dict[str, dict[str, Any]]
    trials: list[dict[str, Any]]
    outcome: CompressionOutcome | None
    runtimes: dict[str, dict[str, dict[str, Any]]]


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
        "runtimes": comparison.runtimes,
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
    for runtime, models in comparison.runtimes.items():
        print_table(f"in {runtime}", {name: ", ".join(_described(values)) for name, values in models.items()})
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
        f"<p>All models begin with {escape(str(path))}. Each training has {epochs} epochs, those of a search included. "
        "The interval of an accuracy has 95 %. Latencies are medians of calls in turn on this machine.</p>"
    )
    tables: dict[str, str] = {}
    if comparison.trials:
        tables["Search"] = html_table(*_trial_rows(comparison.trials))
    if comparison.outcome is not None:
        tables |= outcome_tables(comparison.outcome)
    if comparison.runtimes:
        tables["In other runtimes"] = html_table(*_runtime_rows(comparison.runtimes))
    rest = "".join(
        f'<section><h2>{title}</h2><div class="scroll">{table}</div></section>' for title, table in tables.items()
    )
    section = f'<section><h2>Dense and compressed</h2><div class="scroll"><table><tr><th></th>{head}</tr>{body}</table>'
    return render_page("compression", path.name, f"{section}</div>{note}</section>{rest}")


def _trial_rows(trials: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the columns and the rows of the models that a search has tried."""
    names = {
        "keep_macs": "share of multiply-adds",
        "bits": "mean bits of a weight",
        "trained": "trained",
        "drop": "drop of accuracy in validation",
    }
    known = [name for name in names if any(name in trial for trial in trials)]
    rows = [[_plain(trial.get(name)) for name in known] for trial in trials]
    return [names[name] for name in known], rows


def _runtime_rows(runtimes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the columns and the rows of the models in the runtimes."""
    return ["runtime", "model", ""], [
        [runtime, name, ", ".join(_described(values))]
        for runtime, models in runtimes.items()
        for name, values in models.items()
    ]


def _described(values: Mapping[str, Any]) -> list[str]:
    """Returns what a runtime does with a model, as texts."""
    if "reason" in values:
        return [f"cannot take it: {values['reason']}"]
    texts = [f"{values['bytes']:,} bytes"]
    texts += [f"{format_number(value)} {name}" for name, value in values.items() if name.startswith("ms at")]
    if "labels" in values:
        texts.append(f"{values['labels that differ']:,} of {values['labels']:,} labels differ from lightkit's")
    elif "largest difference" in values:
        texts.append(f"outputs differ by up to {format_number(values['largest difference'])}")
    return texts


def _plain(value: Any) -> str:
    return "" if value is None else format_number(value) if isinstance(value, float) else str(value)
