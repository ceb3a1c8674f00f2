"""Report sections of a classification: the confusion matrix, the worst mistakes and a table of the classes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.app.report.figures import GREEN, MAX_NAME_LENGTH, escape_name, grid, save, styled
from lightkit.app.report.section import Section


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
    matrix = confusion_matrix(logits, labels, classes)
    result = [Section("Confusion matrix", figure=save(matrix, run_dir / "confusion_matrix.png"))]
    images = getattr(getattr(data, "test", None), "images", None)
    if images is not None and (worst := worst_mistakes(images, logits, labels, classes)) is not None:
        result.append(Section("The worst mistakes", figure=save(worst, run_dir / "mistakes.png")))
    result.append(Section("Class by class", html=class_table(logits, labels, classes)))
    return result


@styled
def confusion_matrix(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draws the counts of predicted and true classes; the colour shows the mistakes alone.

    Args:
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.
    """
    count = len(classes)
    matrix = torch.zeros(count, count, dtype=torch.long)
    matrix.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    mistakes = matrix.clone().fill_diagonal_(0).float()
    side = max(4.0, 0.45 * count)
    figure, axes = grid(side + 0.3, side, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.grid(False)
    axis.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(1.0, float(mistakes.max())))
    dark = float(mistakes.max()) * 0.6
    for i in range(count):
        for j in range(count):
            value = int(matrix[i, j])
            if value:
                color = GREEN if i == j else ("white" if mistakes[i, j] > dark else "black")
                text = axis.text(j, i, str(value), ha="center", va="center", color=color, fontsize=9)
                # The layout engine need not measure texts inside the axes.
                text.set_in_layout(False)
    axis.set(xlabel="predicted", ylabel="true")
    names = [escape_name(name) for name in classes]
    axis.set_xticks(range(count), names, rotation=45 if max(map(len, classes)) > 2 else 0, ha="center")
    axis.set_yticks(range(count), names)
    return figure


@styled
def worst_mistakes(
    images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], rows: int = 3, columns: int = 8
) -> Figure | None:
    """Draws the wrong predictions of the highest probability, with predicted and true class.

    Args:
        images: uint8 ``(N, H, W)``.
        logits: ``(N, C)``.
        labels: the true classes, int64 ``(N)``.
        classes: the names of the C classes.
        rows: the largest number of rows of images.
        columns: the largest number of columns of images.

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
    longest = min(MAX_NAME_LENGTH, max(len(classes[label]) for label in shown))
    # All images share one pair of axes: the layout of 24 pairs takes ten times as long as drawing the images.
    side = max(1.45, 0.085 * (longest + len("true: ")))
    figure, axes = grid(side * columns, 1.34 * side * rows, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.axis("off")
    height, width = (0.92 * side / max(images.shape[1:3]) for side in images.shape[1:3])
    for position, index in enumerate(wrong.tolist()):
        row, column = divmod(position, columns)
        middle, top = column + 0.5, 1.34 * row + 0.38
        extent = (middle - width / 2, middle + width / 2, top + height, top)
        axis.imshow(images[index].numpy(), cmap="gray_r", extent=extent)
        guess, truth = (escape_name(classes[int(label[index])]) for label in (predicted, labels))
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
