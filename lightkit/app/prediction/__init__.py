"""What `lightkit.predict` does for each kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig

from lightkit.app.restore import Restored, refusals_of_a_model
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask

# Keys of conf/predict.yaml that say something to one kind of task alone; null where they are not given.
_KEYS_OF = {
    "images": ("invert", "batch_size"),
    "series": ("column", "horizon"),
    "text": ("text", "length", "temperature", "top_k", "seed"),
}


class Prediction(Protocol):
    """What a model makes of an input."""

    def show(self) -> None:
        """Prints it for a person."""

    def write(self, path: Path) -> None:
        """Writes all of it to a file."""


def predict(config: DictConfig, restored: Restored) -> Prediction:
    """Lets the model of a checkpoint predict what ``config`` asks for.

    Raises:
        LightkitError: the input cannot be used, or a key is of another kind of task.
    """
    kind = _kind(restored)
    for other, keys in _KEYS_OF.items():
        given = [key for key in keys if config.get(key) is not None]
        if other != kind and given:
            raise ConfigError(f"{', '.join(given)}: the checkpoint is of a model for {kind}, these are for {other}")
    if kind != "text" and config.input is None:
        raise ConfigError(f"input=PATH must say which {kind} the prediction is for")
    from lightkit.app.prediction import images, series, text

    with refusals_of_a_model():
        return {"images": images.predict, "series": series.predict, "text": text.predict}[kind](config, restored)


def _kind(restored: Restored) -> str:
    if isinstance(restored.task, ClassificationTask):
        return "images"
    if isinstance(restored.task, ForecastTask):
        return "series"
    if isinstance(restored.task, LanguageModelTask):
        return "text"
    raise ConfigError(f"there is no prediction with a {type(restored.task).__name__}")
