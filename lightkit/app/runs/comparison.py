"""Compares runs: what differs in their configurations, their figures side by side, and a page with their curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.pages.curves import RunCurves, curves_data, curves_html
from lightkit.app.pages.document import escape, link, render_page
from lightkit.app.runs.differences import differing_keys
from lightkit.app.runs.summary import LOG, REPORT, RunSummary

# The number of runs whose curves a page draws, and of the points of a line.
MAX_CURVES = 40
_POINTS = 400


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        runs: the directories of the runs.
        states: the states of the runs.
        settings: the dotted keys that differ, each with the value of every run as a text.
        metrics: every metric that a run has, each with the number of every run; None for a run without it.
    """

    runs: list[Path]
    states: list[str]
    settings: dict[str, list[str]]
    metrics: dict[str, list[float | None]]

    def rows(self) -> list[dict[str, Any]]:
        """Returns the comparison as the rows of a table: a row for each key and metric, a column for each run."""
        columns = run_labels(self.runs)
        parts: list[tuple[str, list[Any]]] = [("state", self.states), *self.settings.items()]
        parts += [
            (name, [None if v is None else format_number(v) for v in values]) for name, values in self.metrics.items()
        ]
        return [{"": name, **dict(zip(columns, values, strict=True))} for name, values in parts]


def compare_runs(runs: Sequence[RunSummary]) -> Comparison:
    """Returns the comparison of runs, in their order."""
    names = sorted({name for run in runs for name in run.metrics})
    metrics = {name: [run.metrics.get(name) for run in runs] for name in names}
    return Comparison([run.directory for run in runs], [run.state for run in runs], differing_keys(runs), metrics)


def run_labels(directories: Sequence[Path]) -> list[str]:
    """Returns short names of directories that differ from each other."""
    labels = [path.name for path in directories]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in directories]
    return [label if label not in labels[:place] else f"{label} ({place + 1})" for place, label in enumerate(labels)]


def comparison_page(runs: Sequence[RunSummary], page: Path) -> str:
    """Returns a page with the curves of runs over each other, their settings and their figures, as HTML.

    Args:
        runs: the runs.
        page: the path of the page, from which it links to the reports of the runs.
    """
    labels = run_labels([run.directory for run in runs])
    comparison = compare_runs(runs)
    data = curves_data(
        [
            RunCurves(label, run.directory / LOG, run.state, max_points=_POINTS)
            for label, run in list(zip(labels, runs, strict=True))[:MAX_CURVES]
        ]
    )
    heads = "".join(f"<th>{_report_link(label, run, page)}</th>" for label, run in zip(labels, runs, strict=True))
    sections = {
        "Learning curves": "" if data is None else curves_html(data, "<p>The charts need the package mpld3.</p>"),
        "What differs in the configurations": _side_by_side(heads, comparison.settings)
        if comparison.settings
        else "<p>Nothing differs.</p>",
        "Figures": _side_by_side(
            heads,
            {
                name: ["" if value is None else format_number(value, 6) for value in values]
                for name, values in comparison.metrics.items()
            },
        ),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content)
    return render_page(
        f"{len(runs)} runs",
        printable(", ".join(labels[:8])),
        body,
        {} if data is None else {"curves-data": data},
        [] if data is None else ["curves"],
    )


def _side_by_side(heads: str, rows: dict[str, list[str]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    )
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="sides">{head}<tbody>{lines}</tbody></table></div>'


def _report_link(label: str, run: RunSummary, page: Path) -> str:
    report = run.directory / REPORT
    return link(os.path.relpath(report, page.absolute().parent), label) if report.is_file() else escape(label)
