"""The learning curves of one or several runs, as the data of ``assets/curves.js`` and the HTML around them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkit._util.csv_rows import read_rows
from lightkit._util.printable import printable
from lightkit.app.pages.document import escape, plotting_library

# Stages of a training, whose curves of one name share a chart, and what the chart calls them.
_STAGES = {"train": "training", "val": "validation"}

# What the names of a metric end with that Lightning logs both at each step and for each epoch.
_STEP, _EPOCH = "_step", "_epoch"

# The names that come first, and the number of charts that are open at once.
_FIRST = ("loss", "accuracy")
_MAX_OPEN = 2

# Metrics of the training whose charts are of less interest than all others.
_RATES = "_per_second"


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run.

    Args:
        name: the name of the run in the legend.
        log: the path of its ``metrics.csv``.
        note: a text about the run; empty for none.
        is_shown: True to show the run when the page opens.
        max_points: the number of points of a line; of a longer one, the extremes of each stretch are kept.
    """

    name: str
    log: Path
    note: str = ""
    is_shown: bool = True
    max_points: int = 1000


def curves_data(runs: Sequence[RunCurves]) -> dict[str, Any] | None:
    """Returns the data of ``assets/curves.js``.

    Args:
        runs: the runs; the first one is the run of the page.

    Returns:
        The data; None if no run has a curve of two points or more.
    """
    charts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    described = []
    for index, run in enumerate(runs):
        rows = read_rows(run.log)
        for column, (steps, values) in _columns(rows).items():
            chart, kind = _chart_of(column)
            x, y = _thin(steps, values, run.max_points)
            charts[chart].append({"run": index, "kind": kind, "x": x, "y": y})
        described.append(
            {
                "name": printable(run.name),
                "note": printable(run.note),
                "shown": run.is_shown,
                "steps_per_epoch": _steps_per_epoch(rows),
            }
        )
    drawn = [_chart(name, lines) for name, lines in charts.items() if any(len(line["x"]) > 1 for line in lines)]
    if not drawn:
        return None
    drawn.sort(key=_rank)
    return {"runs": described, "charts": drawn, "first": _MAX_OPEN}


def curves_html(data: dict[str, Any], fallback: str = "") -> str:
    """Returns the HTML in which ``assets/curves.js`` draws.

    Args:
        data: the result of `curves_data`.
        fallback: HTML that a browser without JavaScript shows instead, and every browser if d3 is not installed.
    """
    if plotting_library() is None:
        return fallback
    further = len(data["charts"]) - _MAX_OPEN
    more = f'<details><summary>{further} more</summary><div id="more-curves"></div></details>' if further > 0 else ""
    without = f"<noscript>{fallback}</noscript>" if fallback else ""
    hint = "Drag over a chart to zoom, double-click to see the whole range."
    return (
        f'<div class="tools" id="curve-runs"></div><div class="tools" id="curve-tools"></div>'
        f'<div id="curves"></div>{more}<p class="hint" id="curve-hint" hidden>{escape(hint)}</p>{without}'
    )


def _columns(rows: list[dict[str, str]]) -> dict[str, tuple[list[int], list[float | None]]]:
    """Returns the steps and the values of each column; None for a value that is no finite number."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for row in rows:
        step = int(row["step"])
        for name, text in row.items():
            if text and name not in ("step", "epoch") and not name.startswith("test/"):
                try:
                    value = float(text)
                except ValueError:
                    continue
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value if math.isfinite(value) else None)
    return found


def _chart_of(column: str) -> tuple[str, str]:
    """Returns the name of the chart of a column, and what the chart calls the line."""
    stage, _, name = column.partition("/")
    if stage not in _STAGES or not name:
        return column, ""
    for ending, rest in ((_STEP, ", each step"), (_EPOCH, ", mean of the epoch")):
        if name.endswith(ending) and len(name) > len(ending):
            return name.removesuffix(ending), _STAGES[stage] + rest
    return name, _STAGES[stage]


def _thin(steps: list[int], values: list[float | None], limit: int) -> tuple[list[int], list[float | None]]:
    """Returns at most ``limit`` points: of each stretch of equal length the first, the smallest and the largest."""
    if len(steps) <= limit:
        return steps, values
    stretches = max(1, limit // 3)
    kept = set()
    for number in range(stretches):
        places = range(len(steps) * number // stretches, len(steps) * (number + 1) // stretches)
        finite = [(value, place) for place in places if (value := values[place]) is not None]
        kept |= {places[0], *((min(finite)[1], max(finite)[1]) if finite else ())}
    order = sorted(kept)
    return [steps[place] for place in order], [values[place] for place in order]


def _steps_per_epoch(rows: list[dict[str, str]]) -> float:
    """Returns the steps of an epoch, by the last row of the epoch before the last; 0 if no epoch is complete."""
    last: dict[int, int] = {}
    for row in rows:
        if (epoch := row.get("epoch", "")).isdecimal():
            last[int(epoch)] = max(last.get(int(epoch), 0), int(row["step"]))
    if not last:
        return 0
    # The last epoch may have ended early.
    epoch = sorted(last)[-2] if len(last) > 1 else max(last)
    return (last[epoch] + 1) / (epoch + 1)


def _chart(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    order = {kind: rank for rank, kind in enumerate(("training, each step", "training", "validation"))}
    kinds = sorted({line["kind"] for line in lines}, key=lambda kind: (order.get(kind, len(order)), kind))
    # The mean of an epoch hides beside the steps, of which it is the mean.
    quiet = [
        kind for kind in kinds if kind.endswith("mean of the epoch") and kind.split(",")[0] + ", each step" in kinds
    ]
    return {"name": printable(name), "kinds": kinds, "quiet": quiet, "lines": lines}


def _rank(chart: dict[str, Any]) -> tuple[int, int, str]:
    name = chart["name"]
    if name in _FIRST:
        return (0, _FIRST.index(name), name)
    return (3 if name.endswith(_RATES) else 1 if "validation" in chart["kinds"] else 2, 0, name)
