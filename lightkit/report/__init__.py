"""The report of a run: figures as PNG, and one page that holds them all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor


def write(
    run_dir: Path,
    metrics: dict[str, Any],
    data: pl.LightningDataModule,
    predictions: tuple[Tensor, Tensor] | None,
) -> Path | None:
    """Writes the figures and ``report.html`` into a run directory.

    Args:
        run_dir: with ``config.yaml``, ``environment.json`` and ``metrics.csv`` in it.
        metrics: the final metrics.
        data: what the run was about; an image data module gets its mistakes shown.
        predictions: logits ``(N, C)`` and labels ``(N)`` of the test set.

    Returns:
        The page, or None where matplotlib is not installed.
    """
    try:
        from lightkit.report import figures
    except ImportError as error:
        warnings.warn(f"no report: {error.name} is not installed; pip install 'lightkit[app]'", stacklevel=2)
        return None
    from lightkit.report import page

    shown = {}
    if (curves := figures.learning_curves(run_dir / "metrics.csv")) is not None:
        shown["Learning curves"] = figures.save(curves, run_dir / "learning_curves.png")
    table = None
    if predictions is not None and hasattr(data, "classes"):
        logits, labels = predictions
        table = page.class_table(logits, labels, data.classes)
        confusion = figures.confusion_matrix(logits, labels, data.classes)
        shown["Confusion matrix"] = figures.save(confusion, run_dir / "confusion_matrix.png")
        images = getattr(getattr(data, "test", None), "images", None)
        if images is not None and (worst := figures.worst_mistakes(images, logits, labels, data.classes)) is not None:
            shown["The worst mistakes"] = figures.save(worst, run_dir / "mistakes.png")
    target = run_dir / "report.html"
    target.write_text(page.render(run_dir, metrics, shown, table), encoding="utf-8")
    return target
