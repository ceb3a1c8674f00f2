"""Predictions with the model of a checkpoint of any task, for `lightkit.predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl

from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.restore import RestoredTask, model_errors_as_checkpoint_errors
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask

# The fields of a request that concern one kind of input alone.
_FIELDS_BY_KIND = {
    "images": ("invert", "batch_size"),
    "series": ("column", "horizon"),
    "text": ("text", "length", "temperature", "top_k", "seed"),
}


class Prediction(Protocol):
    """The output of a model for one request."""

    def show(self) -> None:
        """Prints the output, or the beginning of it."""

    def write(self, path: Path) -> None:
        """Writes the whole output to a file."""


def predict(restored: RestoredTask, request: PredictionRequest) -> Prediction:
    """Predicts with the model of a checkpoint.

    Args:
        restored: the task of the checkpoint.
        request: the input and the options.

    Raises:
        LightkitError: the input cannot be used, or a field of the request is for another kind of task.
    """
    task = restored.task
    kind = _input_kind(task)
    for other, keys in _FIELDS_BY_KIND.items():
        given = [key for key in keys if getattr(request, key) is not None]
        if other != kind and given:
            raise ConfigError(f"{', '.join(given)}: the checkpoint is of a model for {kind}, these are for {other}")
    if kind != "text":
        request.require_input(kind)
    from lightkit.app.prediction import images, series, text

    with model_errors_as_checkpoint_errors():
        data = restored.build_data()
        if isinstance(task, ClassificationTask):
            return images.predict(task, data, request)
        if isinstance(task, ForecastTask):
            return series.predict(task, data, request)
        assert isinstance(task, LanguageModelTask)
        return text.predict(task, data, request)


def _input_kind(task: pl.LightningModule) -> str:
    """Returns the kind of input of ``task``, a key of `_FIELDS_BY_KIND` such as ``images``."""
    if isinstance(task, ClassificationTask):
        return "images"
    if isinstance(task, ForecastTask):
        return "series"
    if isinstance(task, LanguageModelTask):
        return "text"
    raise ConfigError(f"there is no prediction with a {type(task).__name__}")
