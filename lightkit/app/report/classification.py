"""Report sections of a classification: the confusion matrix, the worst mistakes and a table of the classes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.app.report.figures import GREEN, escape_names, grid, save, styled
from lightkit.app.report.section import Section, make_section

# The largest number of classes whose counts a figure can show as numbers, its largest side in inches, and the number of
# pairs of classes that a table names beyond that.
_MAX_NUMBERED, _MAX_SIDE, _CONFUSED_ROWS = 30, 13.5, 15


def sections(run_dir: Path, data: pl.LightningDataModule, recorded: dict[str, Tensor]) -> list[Section]:
    """Returns the report sections about the test of a classification, and writes their figures into ``run_dir``.

    Args:
        run_dir: the directory for the figures.
        data: the data module; without ``classes`` the function returns an empty list.
        recorded: a dict with the keys ``logits`` ``(N, C)`` and ``labels`` ``(N)`` of the test set. For an empty dict
            the function returns an empty list.
    """
    classes = getattr(data, "classes", None)
    if not recorded or classes is None:
        return []
    logits, labels = recorded["logits"], recorded["labels"]
    images = getattr(getattr(data, "test", None), "images", None)

    def matrix() -> Path | None:
        return save(confusion_matrix(logits, labels, classes), run_dir / "confusion_matrix.png")

    def mistakes() -> Path | None:
        # Images that are bright on dark, as those of the MNIST family, are shown as ink on paper.
        form = getattr(data, "image_format", None)
        as_ink = form is None or form().invert == "auto"
        worst = None if images is None else worst_mistakes(images, logits, labels, classes, as_ink=as_ink)
        return save(worst, run_dir / "mistakes.png")

    return [
        *make_section("Confusion matrix", matrix),
        *make_section("Most confused classes", lambda: confused_table(logits, labels, classes)),
        *make_section("The worst mistakes", mistakes),
        *make_section("Class by class", lambda: class_table(logits, labels, classes)),
    ]


@styled
def confusion_matrix(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draws the counts of predicted and true classes; the colour shows the mistakes alone.

    Of more than `_MAX_NUMBERED` classes the figure has colours without numbers, and the names of some classes.

    Args:
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.
    """
    count = len(classes)
    matrix = count_pairs(logits, labels, count)
    mistakes = matrix.clone().fill_diagonal_(0).float()
    side = min(max(4.0, 0.45 * count), _MAX_SIDE)
    figure, axes = grid(side + 0.3, side, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.grid(False)
    axis.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(1.0, float(mistakes.max())), interpolation="nearest")
    if count <= _MAX_NUMBERED:
        _write_numbers(axis, matrix, mistakes)
    axis.set(xlabel="predicted", ylabel="true")
    step = -(-count // _MAX_NUMBERED)
    places = range(0, count, step)
    names = escape_names([classes[place] for place in places])
    axis.set_xticks(places, names, rotation=(90 if step > 1 else 45) if max(map(len, names)) > 2 else 0, ha="center")
    axis.set_yticks(places, names)
    return figure


def _write_numbers(axis: Any, matrix: Tensor, mistakes: Tensor) -> None:
    dark = float(mistakes.max()) * 0.6
    for i, j in matrix.nonzero().tolist():
        color = GREEN if i == j else ("white" if mistakes[i, j] > dark else "black")
        text = axis.text(j, i, str(int(matrix[i, j])), ha="center", va="center", color=color, fontsize=9)
        # The layout engine need not measure texts inside the axes.
        text.set_in_layout(False)


def count_pairs(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Returns how often each class (row) was predicted as each class (column), int64 ``(count, count)``."""
    pairs = labels * count + logits.argmax(dim=1)
    return pairs.bincount(minlength=count * count).view(count, count)


def confused_table(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> str | None:
    """Returns an HTML table of the pairs of classes that are confused most often.

    Args:
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.

    Returns:
        The table; None if the figure of the confusion matrix has the numbers, or if every prediction is right.
    """
    if len(classes) <= _MAX_NUMBERED:
        return None
    mistakes = count_pairs(logits, labels, len(classes)).fill_diagonal_(0)
    most, places = mistakes.flatten().topk(_CONFUSED_ROWS)
    rows = []
    for number, place in zip(most.tolist(), places.tolist(), strict=True):
        true, predicted = divmod(place, len(classes))
        if number:
            names = [html.escape(printable(str(classes[index]))) for index in (true, predicted)]
            rows.append(f"<tr><td>{names[0]}</td><td>{names[1]}</td><td>{number}</td></tr>")
    head = "<tr><th>class</th><th>predicted as</th><th>samples</th></tr>"
    return f'<table class="classes">{head}{"".join(rows)}</table>' if rows else None


@styled
def worst_mistakes(
    images: Any,
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    rows: int = 3,
    columns: int = 8,
    as_ink: bool = True,
) -> Figure | None:
    """Draws the wrong predictions of the highest probability, with predicted and true class.

    Args:
        images: uint8 ``(N, H, W)`` or, in colour, ``(N, 3, H, W)``; a tensor, or an object with a shape that returns
            the image at an index.
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.
        rows: the largest number of rows of images.
        columns: the largest number of columns of images.
        as_ink: True shows the highest value of grey images as black.

    Returns:
        The figure; None if every prediction is right.
    """
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    if len(wrong) == 0:
        return None
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][: rows * columns]
    columns = min(columns, len(wrong))
    rows = -(-len(wrong) // columns)
    shown = torch.cat([predicted[wrong], labels[wrong]]).tolist()
    names = escape_names(classes)
    longest = max(len(names[label]) for label in shown)
    # All images share one pair of axes: the layout of 24 pairs takes ten times as long as drawing the images.
    side = max(1.45, 0.085 * (longest + len("true: ")))
    figure, axes = grid(side * columns, 1.34 * side * rows, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.axis("off")
    height, width = (0.92 * side / max(images.shape[-2:]) for side in images.shape[-2:])
    for position, index in enumerate(wrong.tolist()):
        row, column = divmod(position, columns)
        middle, top = column + 0.5, 1.34 * row + 0.38
        extent = (middle - width / 2, middle + width / 2, top + height, top)
        image = images[index]
        colours = image.permute(1, 2, 0) if image.dim() == 3 and len(image) == 3 else image.reshape(image.shape[-2:])
        axis.imshow(colours.numpy(), cmap="gray_r" if as_ink else "gray", vmin=0, vmax=255, extent=extent)
        guess, truth = (names[int(label[index])] for label in (predicted, labels))
        title = f"{guess} ({confidence[index]:.0%})\ntrue: {truth}"
        axis.text(middle, top - 0.04, title, ha="center", va="bottom", fontsize=9)
    # imshow sets the limits to each image in turn.
    axis.set(xlim=(0, columns), ylim=(1.34 * rows, 0))
    return figure


def class_table(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Returns an HTML table of precision, recall and number of samples of each class.

    Args:
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.
    """
    predicted = logits.argmax(dim=1)
    rows = []
    for index, name in enumerate(classes):
        hits = int(((predicted == index) & (labels == index)).sum())
        claimed, present = int((predicted == index).sum()), int((labels == index).sum())
        precision = f"{hits / claimed:.1%}" if claimed else "–"
        recall = f"{hits / present:.1%}" if present else "–"
        rows.append(
            f"<tr><td>{html.escape(printable(name))}</td><td>{precision}</td><td>{recall}</td><td>{present}</td></tr>"
        )
    head = "<tr><th>class</th><th>precision</th><th>recall</th><th>samples</th></tr>"
    return f'<table class="classes">{head}{"".join(rows)}</table>'
