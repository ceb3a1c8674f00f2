"""The page of a report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

_TEMPLATE = Path(__file__).with_name("template.html")

# The figures a person looks for first, and how to write them.
_CARDS = (
    ("test/accuracy", "test accuracy", "{:.2%}"),
    ("test/loss", "test loss", "{:.4f}"),
    ("train/images_per_second", "images a second in training", "{:,.0f}"),
    ("epochs", "epochs", "{}"),
    ("wall_seconds", "seconds in all", "{:,.1f}"),
)


def render(run_dir: Path, metrics: dict[str, Any], figures: dict[str, Path], classes: str | None) -> str:
    """The whole page."""
    cards = "".join(
        f'<div class="card"><b>{form.format(metrics[key])}</b><span>{label}</span></div>'
        for key, label, form in _CARDS
        if key in metrics
    )
    sections = "".join(_figure(title, path) for title, path in figures.items())
    if classes is not None:
        sections += f"<section><h2>Class by class</h2>{classes}</section>"
    environment = json.loads((run_dir / "environment.json").read_text())
    config = (run_dir / "config.yaml").read_text()
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(_title(config, run_dir)),
        run_dir=html.escape(run_dir.name),
        cards=cards,
        sections=sections,
        metrics=_rows(metrics),
        environment=_rows(environment),
        config=html.escape(config),
    )


def _title(config: str, run_dir: Path) -> str:
    name = next((line.partition(":")[2].strip() for line in config.splitlines() if line.startswith("name:")), "")
    return name or run_dir.name


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<section><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}"></section>'


def _rows(values: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_text(value))}</td></tr>" for name, value in values.items()
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def class_table(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Precision, recall and number of samples of each class."""
    predicted = logits.argmax(dim=1)
    rows = []
    for index, name in enumerate(classes):
        hits = int(((predicted == index) & (labels == index)).sum())
        claimed, present = int((predicted == index).sum()), int((labels == index).sum())
        precision = f"{hits / claimed:.1%}" if claimed else "–"
        recall = f"{hits / present:.1%}" if present else "–"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{precision}</td><td>{recall}</td><td>{present}</td></tr>")
    head = "<tr><th>class</th><th>precision</th><th>recall</th><th>samples</th></tr>"
    return f'<table class="classes">{head}{"".join(rows)}</table>'
