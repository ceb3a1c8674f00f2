"""Report sections of a regression: predicted over true values, the errors, and a table beside simple rules."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.report.figures import BLUE, GREY, escape_name, grid, save, styled
from lightkit.app.report.section import Section, make_section

# The largest number of points in the figure, evenly spaced in the order of the rows.
_MAX_POINTS = 5000

# The rows of the largest errors in the table.
_MAX_WORST = 10

_RULES = {"mean": "the mean of the training", "linear": "a linear rule"}


def sections(
    run_dir: Path, metrics: dict[str, Any], data: pl.LightningDataModule, recorded: dict[str, Tensor]
) -> list[Section]:
    """Returns the report sections about the test of a regression, and writes their figures into ``run_dir``.

    Args:
        run_dir: the directory for the figures.
        metrics: the final metrics by name.
        data: the data module.
        recorded: a dict with the keys ``prediction`` and ``target``, each ``(N, K)``, of which the sections show the
            first of the K values. For an empty dict the function returns an empty list.
    """
    if not recorded:
        return []
    prediction, target = (recorded[name][:, 0].double().numpy() for name in ("prediction", "target"))
    name = getattr(getattr(data, "fitted", None), "target", "target")

    def points() -> Path | None:
        return save(predicted_over_true(prediction, target, name), run_dir / "predictions.png")

    def errors() -> Path | None:
        return save(histogram(prediction - target), run_dir / "errors.png")

    return [
        *make_section("Predicted and true", points),
        *make_section("Errors of the test", errors),
        *make_section("Beside simple rules", lambda: rule_table(metrics)),
        *make_section("The largest errors", lambda: worst_table(prediction, target)),
    ]


@styled
def predicted_over_true(prediction: np.ndarray, target: np.ndarray, name: str) -> Figure:
    """Draws a point for each row of the test, and the line on which predictions are right.

    Args:
        prediction: the predictions, ``(N)``.
        target: the true values, ``(N)``.
        name: the name of the target.
    """
    chosen = np.unique(np.linspace(0, len(target) - 1, _MAX_POINTS).astype(int)) if len(target) > _MAX_POINTS else ...
    x, y = target[chosen], prediction[chosen]
    figure, axes = grid(5.2, 4.8, nrows=1, ncols=1)
    axis = axes[0, 0]
    finite = np.concatenate([x, y])[np.isfinite(np.concatenate([x, y]))]
    ends = [finite.min(), finite.max()] if len(finite) else [0, 1]
    axis.plot(ends, ends, color=GREY, linewidth=1)
    axis.scatter(x, y, s=12, color=BLUE, alpha=0.6, linewidths=0)
    axis.set(xlabel=f"true {escape_name(name)}", ylabel="predicted")
    return figure


@styled
def histogram(errors: np.ndarray) -> Figure | None:
    """Draws how often which error occurs; None if no error is finite.

    Args:
        errors: the predictions minus the true values, ``(N)``.
    """
    finite = errors[np.isfinite(errors)]
    if len(finite) == 0:
        return None
    figure, axes = grid(7, 3, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.hist(finite, bins=min(50, max(10, len(finite) // 10)), color=BLUE)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set(xlabel="predicted minus true", ylabel="rows")
    return figure


def rule_table(metrics: dict[str, Any]) -> str | None:
    """Returns an HTML table of the errors of the model and of simple rules; None without such rules.

    Args:
        metrics: the metrics by name, of which the function reads ``test/mae``, ``test/rmse`` and ``baseline/...``.
    """
    named = {"test/mae", "test/rmse", *(f"baseline/{rule}_{name}" for rule in _RULES for name in ("mae", "rmse"))}
    if not named <= metrics.keys():
        return None
    rows = {label: f"baseline/{rule}_" for rule, label in _RULES.items()} | {"this model": "test/"}
    lines = [
        f"<tr><td>{label}</td><td>{format_number(metrics[f'{prefix}mae'])}</td>"
        f"<td>{format_number(metrics[f'{prefix}rmse'])}</td></tr>"
        for label, prefix in rows.items()
    ]
    head = "<tr><th></th><th>mean absolute error</th><th>root mean squared error</th></tr>"
    return f'<table class="classes">{head}{"".join(lines)}</table>'


def worst_table(prediction: np.ndarray, target: np.ndarray) -> str:
    """Returns an HTML table of the rows with the largest errors: their number in the test part, from 1, and values."""
    order = np.argsort(-np.nan_to_num(np.abs(prediction - target), nan=np.inf), kind="stable")[:_MAX_WORST]
    cells = ((str(row + 1), *map(format_number, map(float, (target[row], prediction[row])))) for row in order)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(printable(cell))}</td>' for cell in row)}</tr>" for row in cells)
    return f'<table class="classes"><tr><th>row of the test</th><th>true</th><th>predicted</th></tr>{rows}</table>'
