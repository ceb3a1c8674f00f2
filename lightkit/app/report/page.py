"""The page of a report: one HTML file with the curves of the run and of runs beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightkit._util.numbers import format_number, format_percentage, format_rate
from lightkit.app.pages.curves import RunCurves, curves_data, curves_html
from lightkit.app.pages.document import escape, render_page, table_rows
from lightkit.app.report.provenance import describe_siblings, facts
from lightkit.app.report.section import Section
from lightkit.app.run_records import LOG
from lightkit.app.runs.siblings import MAX_SIBLINGS

# The most important metrics: name, label and the function that formats the value.
_CARDS = (
    ("test/accuracy", "test accuracy", format_percentage),
    ("test/mae", "mean absolute test error", format_number),
    ("test/rmse", "root mean squared test error", format_number),
    ("test/coverage", "of test values in their interval", format_percentage),
    ("test/bits_per_byte", "bits a byte of the test", format_number),
    ("test/perplexity", "test perplexity", format_number),
    ("test/loss", "test loss", format_number),
    ("val/accuracy", "validation accuracy", format_percentage),
    ("train/accuracy", "training accuracy", format_percentage),
    ("train/images_per_second", "images a second in training", format_rate),
    ("train/tokens_per_second", "tokens a second in training", format_rate),
    ("train/windows_per_second", "windows a second in training", format_rate),
    ("train/gigaflops_per_second", "gigaflops a second in training", format_rate),
    ("train/fraction_of_matmul_rate", "times the rate of a matrix product", format_number),
    ("compression/macs_left", "of the multiply-adds left", format_percentage),
    ("compression/zeros", "of the weights are zero", format_percentage),
    ("compression/zipped_bytes", "bytes of the weights, zipped", format_rate),
    ("epochs", "epochs", str),
    ("wall_seconds", "seconds in all", format_rate),
)

# The points of a line of the run itself, and of the runs beside it.
_POINTS, _SIBLING_POINTS = 2000, 300


def render(run_dir: Path, metrics: dict[str, Any], sections: Iterable[Section], curves: Path | None = None) -> str:
    """Returns the page of the report as HTML, which embeds the figures.

    Args:
        run_dir: the run directory, which has ``config.yaml`` and ``environment.json``.
        metrics: the final metrics by name.
        sections: the sections of the report.
        curves: the PNG file of the learning curves, for browsers without JavaScript; None for none.
    """
    cards = "".join(
        f'<div class="card"><b>{escape(form(metrics[key]))}</b><span>{label}</span></div>'
        for key, label, form in _CARDS
        if key in metrics
    )
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    siblings = describe_siblings(run_dir, MAX_SIBLINGS)
    fallback = "" if curves is None else _image("Learning curves", curves)
    data = _curves(run_dir, siblings)
    content = fallback if data is None else curves_html(data, fallback)
    learning = f"<section><h2>Learning curves</h2>{content}</section>" if content else ""
    places = facts(run_dir, environment, [run for run, _ in siblings])
    details = "".join(
        f"<details><summary>{title}</summary>{content}</details>"
        for title, content in {
            "All metrics": f"<table>{table_rows({name: _text(value) for name, value in metrics.items()})}</table>",
            "Machine and versions": f"<table>{table_rows({n: _text(v) for n, v in environment.items()})}</table>",
            "Configuration": f"<pre>{escape(config)}</pre>",
        }.items()
    )
    return render_page(
        title=_title(config, run_dir),
        subtitle=run_dir.name,
        body=f'<div class="cards">{cards}</div>{learning}{"".join(map(_section, sections))}'
        f'<section><h2>This run</h2><table class="facts">{places}</table>{details}</section>',
        data={} if data is None else {"curves-data": data},
        scripts=[] if data is None else ["curves"],
    )


def _curves(run_dir: Path, siblings: list[tuple[Any, str]]) -> dict[str, Any] | None:
    """Returns the curves of the run, and of those beside it that share a chart; the run alone is shown at first."""
    own = RunCurves(f"{run_dir.name} (this run)", run_dir / LOG, max_points=_POINTS)
    others = [
        RunCurves(run.directory.name, run.directory / LOG, f"{run.state}; {note}", False, _SIBLING_POINTS)
        for run, note in siblings
    ]
    return curves_data([own, *others])


def _title(config: str, run_dir: Path) -> str:
    name = next((line.partition(":")[2].strip() for line in config.splitlines() if line.startswith("name:")), "")
    return name or run_dir.name


def _section(section: Section) -> str:
    content = section.html or ""
    if section.figure is not None:
        content += _image(section.title, section.figure)
    return f'<section><h2>{escape(section.title)}</h2><div class="scroll">{content}</div></section>'


def _image(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value, 6)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
    return "none" if value is None else str(value)
