"""Predictions with the model of a checkpoint of any task, for `lightkit.predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl

from lightkit.app.prediction.request import COLUMN_FIELDS, TABLE_FIELDS, PredictionRequest
from lightkit.app.restore import RestoredTask, model_errors_as_checkpoint_errors, restore
from lightkit.data import ImageDataModule, TableDataModule
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask

# The fields of a request that concern one kind of input alone.
_FIELDS_BY_KIND = {
    "images": ("invert", "batch_size", "top_k"),
    "series": ("horizon", *COLUMN_FIELDS, *TABLE_FIELDS),
    "tables": ("batch_size", *TABLE_FIELDS),
    "text": ("text", "length", "temperature", "top_k", "seed", "weights", "cache"),
}


class Prediction(Protocol):
    """The output of a model for one request."""

    def show(self) -> None:
        """Prints the output, or the beginning of it."""

    def write(self, path: Path) -> None:
        """Writes the whole output to a file."""


def predict_from(ckpt_path: str | Path, *, trust: bool = False, **fields: Any) -> Prediction:
    """Predicts with a checkpoint as ``lightkit.predict`` does: ``predict_from("best.ckpt", input="scans/")``.

    Args:
        ckpt_path: a checkpoint of lightkit.train or an export; it may come from an untrusted source.
        trust: allow exports in a format in which a file can run code: see `lightkit.export.open_export`.
        **fields: the fields of a `PredictionRequest`.

    Raises:
        LightkitError: the checkpoint, the input or an option cannot be used.
    """
    return predict(restore(ckpt_path, trust=trust), PredictionRequest(**fields))


def predict(restored: RestoredTask, request: PredictionRequest) -> Prediction:
    """Predicts with the model of a checkpoint.

    Args:
        restored: the task of the checkpoint.
        request: the input and the options.

    Raises:
        LightkitError: the input cannot be used, or a field of the request is for another kind of task.
    """
    task = restored.task
    with model_errors_as_checkpoint_errors():
        data = restored.build_data()
    kind = input_kind(task, data)
    for other, keys in _FIELDS_BY_KIND.items():
        given = request.given(key for key in keys if key not in _FIELDS_BY_KIND[kind])
        if other != kind and given:
            raise ConfigError(f"{', '.join(given)}: the checkpoint is of a model for {kind}, these are for {other}")
    if kind != "text":
        request.require_input(kind)
    from lightkit.app.prediction import images, series, table, text

    with model_errors_as_checkpoint_errors():
        if kind == "tables":
            assert isinstance(task, (ClassificationTask, RegressionTask)) and isinstance(data, TableDataModule)
            return table.predict(task, data, request)
        if isinstance(task, ForecastTask):
            return series.predict(task, data, request)
        if isinstance(task, LanguageModelTask):
            return text.predict(task, data, request)
        return images.predict(task, data, request, restored.checkpoint.get(type(data).__qualname__))


def input_kind(task: pl.LightningModule, data: pl.LightningDataModule) -> str:
    """Returns the kind of input of a task, a key of `_FIELDS_BY_KIND` such as ``images``.

    The data module decides about the task of a user.
    """
    if isinstance(data, TableDataModule) and isinstance(task, (ClassificationTask, RegressionTask)):
        return "tables"
    if isinstance(task, ForecastTask):
        return "series"
    if isinstance(task, LanguageModelTask):
        return "text"
    if isinstance(task, ClassificationTask) or isinstance(data, ImageDataModule):
        return "images"
    raise ConfigError(
        f"there is no prediction with a {type(task).__name__} for a {type(data).__name__}: predict takes the tasks of "
        "lightkit.tasks, and others for images, whose predict_step returns probabilities; call predict_step in a "
        "program of your own"
    )
