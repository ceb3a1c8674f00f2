"""The page of a sweep: its jobs as a table, as parallel coordinates and by their curves, and the best one of them."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.numbers import format_number, format_rate
from lightkit._util.printable import printable
from lightkit.app.pages.curves import RunCurves, curves_data, curves_html
from lightkit.app.pages.document import escape, link, plotting_library, render_page
from lightkit.app.runs.listing import choose_metrics, find_runs
from lightkit.app.runs.summary import LOG, REPORT, STATES, RunSummary, larger_is_better

SWEEP_PAGE = "sweep.html"

# The jobs whose curves the page draws and shows at first, the points of a line, and the axes of parallel coordinates.
_MAX_CURVES, _SHOWN_CURVES, _POINTS = 40, 6, 200
_MAX_AXES = 12

# Of the time between two jobs the page takes at most this share: a page of thousands of jobs waits for some of them.
_SHARE = 0.05


@dataclass(frozen=True)
class SweepSummary:
    """Holds what the files of a sweep tell.

    Args:
        directory: the directory of the sweep.
        jobs: the jobs in the order of their numbers.
        parameters: the keys in whose values the command lines of the jobs differ, each with the text of every job; None
            for a job without the key.
        objective: the name of the metric that compares the jobs; None if no job has one.
        maximizes: True if the largest value of the objective is the best.
        best: the place of the best job in ``jobs``; None if no job has an objective.
    """

    directory: Path
    jobs: list[RunSummary]
    parameters: dict[str, list[str | None]]
    objective: str | None
    maximizes: bool
    best: int | None

    def values(self) -> list[float | None]:
        """Returns the objective of every job: what its sweeper got, or the metric of that name; None without one."""
        values = [self._value(run) for run in self.jobs]
        return [value if value is not None and math.isfinite(value) else None for value in values]

    def _value(self, run: RunSummary) -> float | None:
        return run.result if run.result is not None or self.objective is None else run.value(self.objective)


def read_sweep(directory: Path) -> SweepSummary:
    """Reads the summary of the sweep in ``directory``.

    Raises:
        ConfigError: there is no such directory.
    """
    jobs = sorted(find_runs(directory).runs, key=lambda run: _order(run.directory.name))
    record = _read_record(directory)
    names = Counter(run.objective for run in jobs if run.objective is not None)
    objective = record.get("objective") or (names.most_common(1)[0][0] if names else None)
    objective = objective if isinstance(objective, str) else None
    if record.get("direction") in ("minimize", "maximize"):
        maximizes = record["direction"] == "maximize"
    else:
        maximizes = objective is not None and larger_is_better(objective, jobs[0].config if jobs else None)
    summary = SweepSummary(directory, jobs, _parameters(jobs), objective, maximizes, None)
    sign = -1 if maximizes else 1
    places = [(sign * value, place) for place, value in enumerate(summary.values()) if value is not None]
    best = min((entry for entry in places if jobs[entry[1]].state == "finished"), default=None)
    return SweepSummary(directory, jobs, summary.parameters, objective, maximizes, None if best is None else best[1])


def sweep_page(sweep: SweepSummary) -> str:
    """Returns the page of a sweep as HTML; it links to the reports of the jobs."""
    values = sweep.values()
    metrics = [name for name in choose_metrics(sweep.jobs, 4) if name != sweep.objective]
    states = Counter(run.state for run in sweep.jobs)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    cards = {"jobs": str(len(sweep.jobs))}
    if sweep.best is not None and sweep.objective is not None:
        value = values[sweep.best]
        assert value is not None
        cards |= {f"best {sweep.objective}": format_number(value), "best job": sweep.jobs[sweep.best].directory.name}
    sections = []
    data: dict[str, Any] = {}
    if plotting_library() is not None and len(sweep.jobs) > 1 and (sweep.parameters or metrics):
        data["parallel-data"] = _parallel_data(sweep, metrics, values)
        hint = '<p class="hint" id="parallel-job">Drag along an axis to select jobs.</p>'
        sections.append(("Parameters and figures", f'<div id="parallel"></div>{hint}'))
    sections.append(("Jobs", _table(sweep, metrics, values)))
    if (curves := _curves(sweep, values)) is not None:
        data["curves-data"] = curves
        sections.append(("Learning curves", curves_html(curves)))
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in cards.items()
    )
    body = f'<div class="cards">{body}</div>'
    body += "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    title = f"{sweep.jobs[0].name}: sweep" if sweep.jobs else "sweep"
    return render_page(
        title,
        f"{sweep.directory.absolute().name}; {counts or 'no job yet'}",
        body,
        data,
        ["parallel", "table", "curves"],
    )


def write_sweep_page(directory: Path) -> Path:
    """Writes the page of the sweep in ``directory`` to ``sweep.html`` there, atomically, and returns its path.

    Raises:
        ConfigError: there is no such directory.
        OSError: the page cannot be written.
    """
    path = directory / SWEEP_PAGE
    write_text_atomically(path, sweep_page(read_sweep(directory)))
    return path


def update_sweep_page(directory: Path, force: bool = False) -> None:
    """Writes the page of a sweep after a job; whatever is wrong gives one warning, and the sweep goes on.

    Args:
        directory: the directory of the sweep.
        force: False leaves a page as it is that was written a moment ago, measured by how long writing one takes.
    """
    path = directory / SWEEP_PAGE
    started = time.monotonic()
    try:
        if not force and path.exists():
            age = time.time() - path.stat().st_mtime
            if 0 <= age < _last_seconds.get(path, 0.0) / _SHARE:
                return
        write_sweep_page(directory)
        _last_seconds[path] = time.monotonic() - started
    except Exception as error:
        cause = printable(f"{type(error).__name__}: {error}".partition("\n")[0])
        warnings.warn(f"the page of the sweep could not be written: {cause}", stacklevel=2)


# The seconds that the last page took, by its path.
_last_seconds: dict[Path, float] = {}


def _order(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isascii() and name.isdecimal() and len(name) < 20 else (1, 0, name)


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / "sweep.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _parameters(jobs: Sequence[RunSummary]) -> dict[str, list[str | None]]:
    given = []
    for run in jobs:
        words = (word.partition("=") for word in run.overrides)
        given.append({key.lstrip("+~"): value for key, _, value in words})
    keys = dict.fromkeys(key for one in given for key in one)
    values = {key: [one.get(key) for one in given] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def _as_numbers(texts: Sequence[str | None]) -> list[float | None] | None:
    """Returns the numbers that ``texts`` are; None if one of them is no finite number."""
    numbers: list[float | None] = []
    for text in texts:
        try:
            number = None if text is None else float(text)
        except ValueError:
            return None
        if number is not None and not math.isfinite(number):
            return None
        numbers.append(number)
    return numbers


def _parallel_data(sweep: SweepSummary, metrics: Sequence[str], values: list[float | None]) -> dict[str, Any]:
    """Returns the data of ``assets/parallel.js``."""
    axes = []
    for key, texts in sweep.parameters.items():
        numbers = _as_numbers(texts)
        shown = [None if text is None else printable(text) for text in texts]
        axes.append({"name": printable(key), "numbers": numbers is not None, "values": numbers or shown})
    for name in metrics:
        column = [run.value(name) for run in sweep.jobs]
        finite = [None if value is None or math.isinf(value) else value for value in column]
        axes.append({"name": printable(name), "numbers": True, "values": finite})
    axes = axes[: _MAX_AXES - 1]
    if sweep.objective is not None:
        axes.append({"name": printable(sweep.objective), "numbers": True, "values": values, "objective": True})
    jobs = []
    for place, run in enumerate(sweep.jobs):
        note = ", ".join(f"{key}={texts[place]}" for key, texts in sweep.parameters.items())
        jobs.append({"name": printable(run.directory.name), "note": printable(note)})
    return {"axes": axes, "jobs": jobs, "best": sweep.best, "maximize": sweep.maximizes}


def _table(sweep: SweepSummary, metrics: Sequence[str], values: list[float | None]) -> str:
    objective = [] if sweep.objective is None else [sweep.objective]
    numbers = {key: _as_numbers(texts) for key, texts in sweep.parameters.items()}
    heads = ["job", "state", *objective, *metrics, *sweep.parameters, "seconds"]
    rows = []
    for place, run in enumerate(sweep.jobs):
        path = run.directory / REPORT
        label = f"{run.directory.name} ★" if place == sweep.best else run.directory.name
        job = link(str(path.relative_to(sweep.directory)), label) if path.is_file() else escape(label)
        error = f' title="{escape(run.error)}"' if run.error else ""
        cells = [f'<td data-value="{place}">{job}</td>', f'<td class="state-{run.state}"{error}>{run.state}</td>']
        cells += [_number_cell(values[place])] if objective else []
        cells += [_number_cell(run.metrics.get(name)) for name in metrics]
        for key, texts in sweep.parameters.items():
            column = numbers[key]
            text = texts[place] or ""
            value = "" if column is None or column[place] is None else f' data-value="{column[place]!r}"'
            cells.append(f"<td{value}>{escape(text)}</td>")
        cells.append(_number_cell(run.metrics.get("wall_seconds"), format_rate))
        mark = ' class="best"' if place == sweep.best else ""
        rows.append(f'<tr data-job="{place}"{mark}>{"".join(cells)}</tr>')
    first = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{first}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number_cell(value: float | None, form: Any = format_number) -> str:
    known = value is not None and math.isfinite(value)
    text = "" if value is None else form(value)
    return f'<td class="number" data-value="{repr(value) if known else ""}">{escape(text)}</td>'


def _curves(sweep: SweepSummary, values: list[float | None]) -> dict[str, Any] | None:
    """Returns the curves of the best jobs, and of those that have no objective yet behind them."""
    sign = -1 if sweep.maximizes else 1

    def rank(place: int) -> tuple[bool, float, int]:
        value = values[place]
        return (value is None, 0.0 if value is None else sign * value, place)

    order = sorted(range(len(sweep.jobs)), key=rank)[:_MAX_CURVES]
    return curves_data(
        [
            RunCurves(
                sweep.jobs[place].directory.name,
                sweep.jobs[place].directory / LOG,
                ", ".join(f"{key}={texts[place]}" for key, texts in sweep.parameters.items()),
                number < _SHOWN_CURVES,
                _POINTS,
            )
            for number, place in enumerate(order)
        ]
    )
