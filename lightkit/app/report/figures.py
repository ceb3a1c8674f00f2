"""The style and the files of a report's figures, and the learning curves, which every report has."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightkit._util.atomic_write import write_atomically
from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.report.fonts import draw_as, families_for
from lightkit.loggers import read_rows

P = ParamSpec("P")
T = TypeVar("T")

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#15803d", "#94a3b8"

# The largest number of characters of a name in a figure.
MAX_NAME_LENGTH = 24

_STYLE: dict[Any, Any] = {
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
    # Every string is a text: a formula in the name of a column may be none that matplotlib can read.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Returns the function ``draw`` with the style of the report; the style of the process stays unchanged."""

    @functools.wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


@styled
def save(figure: Figure | None, path: Path) -> Path | None:
    """Writes ``figure`` as a PNG file to ``path`` and returns ``path``; texts get the fonts that they need.

    For None instead of a figure the function writes nothing and returns None.
    """
    if figure is None:
        return None
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        # Labels of ticks are made outside the style too, and keep what is set here.
        text.set_parse_math(False)
        text.set_fontfamily(families_for(text.get_text()))
    # savefig runs the layout engine twice, and a third time for bbox_inches="tight". One run suffices.
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=144, facecolor="white"))
    return path


def grid(width: float, height: float, nrows: int, ncols: int) -> tuple[Figure, np.ndarray]:
    """Returns a figure of ``width`` by ``height`` inches and its axes, an array ``(nrows, ncols)``."""
    # Unlike pyplot, a Figure object needs no display and leaves no global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(nrows, ncols, squeeze=False)


def escape_names(names: Iterable[str]) -> list[str]:
    """Returns names as a figure shows them: shortened, with escapes for characters that no font has or that control."""
    return draw_as(_shorten(printable(name)) for name in names)


def escape_name(name: str) -> str:
    """Returns a name as a figure shows it: see `escape_names`, which is faster for several names."""
    return escape_names([name])[0]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_NAME_LENGTH else f"{text[: MAX_NAME_LENGTH - 1]}…"


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the columns of ``metrics.csv`` by name, as (step, value) pairs without the empty cells."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_rows(path):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                series[name].append((int(row["step"]), float(value)))
    return series


@styled
def learning_curves(path: Path) -> Figure | None:
    """Draws the loss, and the accuracy if the run measured it, over the optimizer step.

    Args:
        path: ``metrics.csv`` of the run.

    Returns:
        The figure; None if the file has no loss.
    """
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
        accuracy.annotate(format_number(y[-1]), (x[-1], y[-1]), textcoords="offset points", xytext=(0, 7), ha="right")
        accuracy.set(title="Accuracy", xlabel="step", ylim=(min(0.9, y.min() - 0.02), 1.0))
        accuracy.legend(loc="lower right")
    return figure
