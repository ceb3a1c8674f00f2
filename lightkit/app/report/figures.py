"""How the figures of a report are drawn, and the one that every report has: the learning curves."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit.loggers import read_rows

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#15803d", "#94a3b8"

# Characters of a name in a figure.
LONGEST_NAME = 24

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG; returns the path."""
    # Laid out once, here: savefig lays out twice a figure that still has a layout engine, and a third time to look for
    # borders (bbox_inches="tight"), which the layout keeps already.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    options = {"format": "png", "dpi": 144, "facecolor": "white"}
    write_atomically(path, lambda stream: figure.savefig(stream, **options))
    return path


def styled(draw: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    """Draws in the style of the report without changing that of the process."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **options: Any) -> Figure | None:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return wrapper


def grid(width: float, height: float, **layout: int) -> tuple[Figure, np.ndarray]:
    """A figure of that many inches and the axes in it, ``nrows`` by ``ncols``."""
    # A Figure of its own needs no display and leaves no global state, as pyplot would.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **layout)


def plain(name: str) -> str:
    """Returns a name as matplotlib draws it as it is: between dollars it would read a formula.

    Of one that is too long to stand beside an axis, the beginning.
    """
    shown = printable(name)
    shown = shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
    return shown.replace("$", r"\$")


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of ``metrics.csv`` as (step, value) pairs, without the empty cells."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_rows(path):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                series[name].append((int(row["step"]), float(value)))
    return series


@styled
def learning_curves(path: Path) -> Figure | None:
    """Loss, and accuracy where it was measured, against the optimizer step."""
    series = read_metrics(path)
    if not series.get("train/loss_step") and not series.get("val/loss"):
        return None
    with_accuracy = bool(series.get("val/accuracy"))
    figure, axes = grid(10 if with_accuracy else 6, 3.6, nrows=1, ncols=2 if with_accuracy else 1)
    loss = axes[0, 0]
    steps = series.get("train/loss_step", [])
    if steps:
        x, y = np.array(steps).T
        loss.plot(x, y, color=GREY, linewidth=0.8, alpha=0.6, label="training, one batch")
        window = max(5, len(y) // 20)
        if len(y) >= 2 * window:
            smooth = np.convolve(y, np.ones(window) / window, mode="valid")
            loss.plot(x[window - 1 :], smooth, color=BLUE, linewidth=1.8, label=f"training, mean of {window}")
    if series.get("val/loss"):
        x, y = np.array(series["val/loss"]).T
        loss.plot(x, y, color=ORANGE, marker="o", markersize=4, label="validation")
    loss.set(title="Loss", xlabel="step", ylim=(0, None))
    loss.legend()
    if with_accuracy:
        accuracy = axes[0, 1]
        x, y = np.array(series["val/accuracy"]).T
        accuracy.plot(x, y, color=ORANGE, marker="o", markersize=4, label="validation")
        accuracy.annotate(f"{y[-1]:.4f}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 7), ha="right")
        accuracy.set(title="Accuracy", xlabel="step", ylim=(min(0.9, y.min() - 0.02), 1.0))
        accuracy.legend(loc="lower right")
    return figure
