"""Predicts with the model of a checkpoint, whatever kind of task it is: what `lightkit.predict` does."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.restore import Restored, errors_of_a_model
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask

# The fields of a request that concern one kind of task alone.
_FIELDS_OF = {
    "images": ("invert", "batch_size"),
    "series": ("column", "horizon"),
    "text": ("text", "length", "temperature", "top_k", "seed"),
}


class Prediction(Protocol):
    """The output of a model for one request."""

    def show(self) -> None:
        """Prints it for a person."""

    def write(self, path: Path) -> None:
        """Writes all of it to a file."""


def predict(restored: Restored, request: PredictionRequest) -> Prediction:
    """Predicts with the model of a checkpoint.

    Raises:
        LightkitError: the input cannot be used, or a field of the request is for another kind of task.
    """
    kind = _kind(restored)
    for other, keys in _FIELDS_OF.items():
        given = [key for key in keys if getattr(request, key) is not None]
        if other != kind and given:
            raise ConfigError(f"{', '.join(given)}: the checkpoint is of a model for {kind}, these are for {other}")
    if kind != "text" and request.input is None:
        raise ConfigError(f"input=PATH must say which {kind} the prediction is for")
    from lightkit.app.prediction import images, series, text

    with errors_of_a_model():
        return {"images": images.predict, "series": series.predict, "text": text.predict}[kind](restored, request)


def _kind(restored: Restored) -> str:
    if isinstance(restored.task, ClassificationTask):
        return "images"
    if isinstance(restored.task, ForecastTask):
        return "series"
    if isinstance(restored.task, LanguageModelTask):
        return "text"
    raise ConfigError(f"there is no prediction with a {type(restored.task).__name__}")
