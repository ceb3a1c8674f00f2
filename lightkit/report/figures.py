"""The figures of a report."""

from __future__ import annotations

import csv
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

_BLUE, _ORANGE, _GREEN, _GREY = "#2563eb", "#ea580c", "#15803d", "#94a3b8"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG; returns the path."""
    figure.savefig(path, dpi=144, bbox_inches="tight", facecolor="white")
    return path


def _styled(draw: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    """Draws in the style of the report without changing that of the process."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **options: Any) -> Figure | None:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return wrapper


def _figure(width: float, height: float, **layout: int) -> tuple[Figure, np.ndarray]:
    # A Figure of its own needs no display and leaves no global state, as pyplot would.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **layout)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of ``metrics.csv`` as (step, value) pairs, without the empty cells."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    if not path.is_file():
        return series
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series[name].append((int(row["step"]), float(value)))
    return series


@_styled
def learning_curves(path: Path) -> Figure | None:
    """Loss, and accuracy where it was measured, against the optimizer step."""
    series = read_metrics(path)
    if not series.get("train/loss_step") and not series.get("val/loss"):
        return None
    with_accuracy = bool(series.get("val/accuracy"))
    figure, axes = _figure(10 if with_accuracy else 6, 3.6, nrows=1, ncols=2 if with_accuracy else 1)
    loss = axes[0, 0]
    steps = series.get("train/loss_step", [])
    if steps:
        x, y = np.array(steps).T
        loss.plot(x, y, color=_GREY, linewidth=0.8, alpha=0.6, label="training, one batch")
        window = max(5, len(y) // 20)
        if len(y) >= 2 * window:
            smooth = np.convolve(y, np.ones(window) / window, mode="valid")
            loss.plot(x[window - 1 :], smooth, color=_BLUE, linewidth=1.8, label=f"training, mean of {window}")
    if series.get("val/loss"):
        x, y = np.array(series["val/loss"]).T
        loss.plot(x, y, color=_ORANGE, marker="o", markersize=4, label="validation")
    loss.set(title="Loss", xlabel="step", ylim=(0, None))
    loss.legend()
    if with_accuracy:
        accuracy = axes[0, 1]
        x, y = np.array(series["val/accuracy"]).T
        accuracy.plot(x, y, color=_ORANGE, marker="o", markersize=4, label="validation")
        accuracy.annotate(f"{y[-1]:.4f}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 7), ha="right")
        accuracy.set(title="Accuracy", xlabel="step", ylim=(min(0.9, y.min() - 0.02), 1.0))
        accuracy.legend(loc="lower right")
    return figure


@_styled
def confusion_matrix(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """How often each class was taken for each other; mistakes are what the colour shows."""
    count = len(classes)
    matrix = torch.zeros(count, count, dtype=torch.long)
    matrix.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    mistakes = matrix.clone().fill_diagonal_(0).float()
    side = max(4.0, 0.45 * count)
    figure, axes = _figure(side + 0.8, side, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.grid(False)
    axis.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(1.0, float(mistakes.max())))
    dark = float(mistakes.max()) * 0.6
    for i in range(count):
        for j in range(count):
            value = int(matrix[i, j])
            if value:
                color = _GREEN if i == j else ("white" if mistakes[i, j] > dark else "black")
                axis.text(j, i, str(value), ha="center", va="center", color=color, fontsize=9)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(range(count), classes, rotation=45 if max(map(len, classes)) > 2 else 0, ha="center")
    axis.set_yticks(range(count), classes)
    return figure


@_styled
def worst_mistakes(
    images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], rows: int = 3, columns: int = 8
) -> Figure | None:
    """The wrong predictions that were most sure of themselves, with predicted and true label."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    if len(wrong) == 0:
        return None
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][: rows * columns]
    columns = min(columns, len(wrong))
    rows = -(-len(wrong) // columns)
    figure, axes = _figure(1.45 * columns, 1.95 * rows, nrows=rows, ncols=columns)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
        axis.imshow(images[index].numpy(), cmap="gray_r")
        guess, truth = classes[predicted[index]], classes[labels[index]]
        axis.set_title(
            f"{guess} ({confidence[index]:.0%})\ntrue: {truth}", fontsize=9, fontweight="normal", loc="center"
        )
    return figure
