"""The report of a run: figures as PNG files, and one HTML page with all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.installation import how_to_install
from lightkit.app.run_records import LOG, REPORT
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask

if TYPE_CHECKING:
    from lightkit.app.compression_outcome import CompressionOutcome
    from lightkit.app.report.section import Section


def write(
    run_dir: Path,
    metrics: dict[str, Any],
    task: pl.LightningModule,
    data: pl.LightningDataModule,
    recorded: dict[str, Tensor],
    outcome: CompressionOutcome | None = None,
) -> Path | None:
    """Writes the figures and ``report.html`` into a run directory; a section that cannot be made says why.

    Args:
        run_dir: the run directory, which has ``config.yaml``, ``environment.json`` and ``metrics.csv``.
        metrics: the final metrics by name.
        task: the trained task, whose class decides which sections the report has.
        data: the data module of the run.
        recorded: the tensors of the test that `lightkit.callbacks.TestRecorder` recorded, by name.
        outcome: what the callbacks of compression have made of the model; None without one.

    Returns:
        The path of ``report.html``; None, with a warning, if matplotlib is not installed or the page cannot be made.
    """
    try:
        from lightkit.app.report import compression, figures, page
    except ImportError as error:
        warnings.warn(f"no report: {error.name} is not installed; {how_to_install('app')}", stacklevel=2)
        return None
    from lightkit.app.report.section import attempt, describe_error, make_section

    def learning_curves() -> Path | None:
        return figures.save(figures.learning_curves(run_dir / LOG), run_dir / "learning_curves.png")

    # The page draws the curves itself, and has the figure for browsers that run no scripts.
    drawn = make_section("Learning curves", learning_curves)
    curves = next((section.figure for section in drawn if section.figure is not None), None)
    sections = [section for section in drawn if section.figure is None]
    sections += attempt("The test", lambda: _test_sections(run_dir, metrics, task, data, recorded))
    if outcome is not None:
        sections += attempt("Compression", lambda: compression.sections(outcome))
    try:
        content = page.render(run_dir, metrics, sections, curves)
    except Exception as error:
        # The metrics are on the disk, and the training must not end in an error.
        warnings.warn(f"no report: {describe_error(error)}", stacklevel=2)
        return None
    target = run_dir / REPORT
    write_text_atomically(target, content)
    return target


def _test_sections(
    run_dir: Path,
    metrics: dict[str, Any],
    task: pl.LightningModule,
    data: pl.LightningDataModule,
    recorded: dict[str, Tensor],
) -> list[Section]:
    """Returns the sections for the class of the task; the arguments are those of `write`."""
    from lightkit.app.report import classification, forecast, language_model, regression

    if isinstance(task, ClassificationTask):
        return classification.sections(run_dir, data, recorded)
    if isinstance(task, ForecastTask):
        return forecast.sections(run_dir, task, data, recorded)
    if isinstance(task, LanguageModelTask):
        return language_model.sections(run_dir, metrics, task, data, recorded)
    if isinstance(task, RegressionTask):
        return regression.sections(run_dir, metrics, data, recorded)
    return []
