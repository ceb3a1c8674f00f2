"""The page of a report: one HTML file that refers to no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from lightkit._util.printable import printable
from lightkit.app.report.section import Section

_TEMPLATE = Path(__file__).with_name("template.html")

# The most important metrics: name, label and format.
_CARDS = (
    ("test/accuracy", "test accuracy", "{:.2%}"),
    ("test/mae", "mean absolute test error", "{:.4g}"),
    ("test/rmse", "root mean squared test error", "{:.4g}"),
    ("test/coverage", "of test values in their interval", "{:.1%}"),
    ("test/bits_per_byte", "bits a byte of the test", "{:.3f}"),
    ("test/perplexity", "test perplexity", "{:.3f}"),
    ("test/loss", "test loss", "{:.4f}"),
    ("train/images_per_second", "images a second in training", "{:,.0f}"),
    ("train/tokens_per_second", "tokens a second in training", "{:,.0f}"),
    ("train/windows_per_second", "windows a second in training", "{:,.0f}"),
    ("train/gigaflops_per_second", "gigaflops a second in training", "{:,.1f}"),
    ("train/fraction_of_matmul_rate", "times the rate of a matrix product", "{:.2f}"),
    ("epochs", "epochs", "{}"),
    ("wall_seconds", "seconds in all", "{:,.1f}"),
)


def render(run_dir: Path, metrics: dict[str, Any], sections: Iterable[Section]) -> str:
    """Returns the page of the report as HTML, which embeds the figures.

    Args:
        run_dir: the run directory, which has ``config.yaml`` and ``environment.json``.
        metrics: the final metrics by name.
        sections: the sections of the report.
    """
    cards = "".join(
        f'<div class="card"><b>{form.format(metrics[key])}</b><span>{label}</span></div>'
        for key, label, form in _CARDS
        if key in metrics
    )
    environment = json.loads((run_dir / "environment.json").read_text())
    config = (run_dir / "config.yaml").read_text()
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escape(_title(config, run_dir)),
        run_dir=_escape(run_dir.name),
        cards=cards,
        sections="".join(map(_section, sections)),
        metrics=_rows(metrics),
        environment=_rows(environment),
        config=_escape(config),
    )


def _title(config: str, run_dir: Path) -> str:
    name = next((line.partition(":")[2].strip() for line in config.splitlines() if line.startswith("name:")), "")
    return name or run_dir.name


def _section(section: Section) -> str:
    content = section.html or ""
    if section.figure is not None:
        data = base64.b64encode(section.figure.read_bytes()).decode()
        content += f'<img alt="{_escape(section.title)}" src="data:image/png;base64,{data}">'
    return f"<section><h2>{_escape(section.title)}</h2>{content}</section>"


def _escape(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))


def _rows(values: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td>{_escape(name)}</td><td>{_escape(_text(value))}</td></tr>" for name, value in values.items()
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
