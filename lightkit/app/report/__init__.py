"""The report of a run: figures as PNG files, and one HTML page with all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.installation import how_to_install
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask


def write(
    run_dir: Path,
    metrics: dict[str, Any],
    task: pl.LightningModule,
    data: pl.LightningDataModule,
    recorded: dict[str, Tensor],
) -> Path | None:
    """Writes the figures and ``report.html`` into a run directory.

    Args:
        run_dir: the run directory, which has ``config.yaml``, ``environment.json`` and ``metrics.csv``.
        metrics: the final metrics by name.
        task: the trained task, whose class decides which sections the report has.
        data: the data module of the run.
        recorded: the tensors of the test that `lightkit.callbacks.TestRecorder` recorded, by name.

    Returns:
        The path of ``report.html``; None if matplotlib is not installed.
    """
    try:
        from lightkit.app.report import figures
    except ImportError as error:
        warnings.warn(f"no report: {error.name} is not installed; {how_to_install('app')}", stacklevel=2)
        return None
    from lightkit.app.report import classification, forecast, language_model, page
    from lightkit.app.report.section import Section

    sections = []
    if (curves := figures.learning_curves(run_dir / "metrics.csv")) is not None:
        sections.append(Section("Learning curves", figure=figures.save(curves, run_dir / "learning_curves.png")))
    if isinstance(task, ClassificationTask):
        sections += classification.sections(run_dir, data, recorded)
    if isinstance(task, ForecastTask):
        sections += forecast.sections(run_dir, task, data, recorded)
    if isinstance(task, LanguageModelTask):
        sections += language_model.sections(run_dir, metrics, task, data, recorded)
    target = run_dir / "report.html"
    write_text_atomically(target, page.render(run_dir, metrics, sections))
    return target
