"""The kinds of input that a server takes, each with the functions of `lightkit.predict` for it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightkit.app.prediction import input_kind
from lightkit.app.prediction.images import model_format
from lightkit.app.serving.kinds.arrays import Arrays
from lightkit.app.serving.kinds.images import Images
from lightkit.app.serving.kinds.kind import Kind
from lightkit.app.serving.kinds.series import Histories
from lightkit.app.serving.kinds.tables import Tables
from lightkit.app.serving.kinds.texts import Texts
from lightkit.data import ImageDataModule
from lightkit.data.arrays import DataModule
from lightkit.data.image_files import ImageFormat
from lightkit.data.series import SeriesDataModule
from lightkit.data.tabular import TableDataModule
from lightkit.data.text import Text
from lightkit.errors import ConfigError
from lightkit.tasks import ForecastTask, LanguageModelTask

__all__ = ["Kind", "find_kind"]


def find_kind(
    task: pl.LightningModule,
    data: pl.LightningDataModule | None,
    state: Any = None,
    form: ImageFormat | None = None,
    max_length: int = 4096,
) -> Kind:
    """Returns the kind of input of a model.

    Args:
        task: the task in evaluation mode, on the device on which it predicts.
        data: the data module, which says how samples become inputs.
        state: the state of ``data`` in the checkpoint, or None: see `lightkit.app.image_sizes.picture_size`.
        form: the format of the images that the model takes, where it is known already; None finds it.
        max_length: see `lightkit.app.serving.ServerSettings`.

    Raises:
        ConfigError: there is no prediction with such a task and such data.
    """
    if data is None:
        raise ConfigError("the model has no data module, which says how a request becomes its input")
    if isinstance(data, DataModule):
        return Arrays(task, data)
    kind = input_kind(task, data)
    if kind == "tables" and isinstance(data, TableDataModule):
        return Tables(task, data)
    if isinstance(task, ForecastTask) and isinstance(data, SeriesDataModule):
        return Histories(task, data)
    if isinstance(task, LanguageModelTask) and isinstance(data, Text):
        return Texts(task, data, max_length)
    if kind == "images" and isinstance(data, ImageDataModule):
        return Images(task, data, model_format(task, data, state) if form is None else form)
    raise ConfigError(f"a server has no {kind} for a {type(task).__name__} of a {type(data).__name__}")
