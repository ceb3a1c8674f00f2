"""The data module of a table that `lightkit.fit` gets as a file or as a DataFrame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lightkit.data import TableDataModule
from lightkit.data.sizes import sizes_for
from lightkit.data.tabular.frames import is_frame
from lightkit.errors import ConfigError
from lightkit.models import MLP

# The files that are tables; a text with another end is a text.
SUFFIXES = (".csv", ".tsv", ".xlsx", ".csv.gz", ".tsv.gz")

# The losses by name that decide between numbers and classes.
_KINDS = {"mse": "regression", "mae": "regression", "huber": "regression", "cross_entropy": "classification"}


def is_table(x: Any) -> bool:
    """Returns True for a DataFrame of pandas, and for the path of a table."""
    return is_frame(x) or isinstance(x, os.PathLike) or (isinstance(x, str) and x.lower().endswith(SUFFIXES))


def make_table(
    x: Any, y: Any, validation: Any, batch_size: int, seed: int, loss: Any = None, class_weight: Any = None
) -> TableDataModule:
    """Returns the data module of a table, split into training and validation.

    Args:
        x: a file or a DataFrame.
        y: the name of the column to predict; for a DataFrame also its values ``(N)``.
        validation: the share of the rows for validation.
        batch_size: the number of rows in a batch of training.
        seed: the seed of the order of the training batches.
        loss: the argument of `lightkit.fit`, which may decide between classes and numbers.
        class_weight: the argument of `lightkit.fit`, which is for classes.

    Raises:
        LightkitError: an argument does not fit, or the table cannot be used.
    """
    if isinstance(validation, bool) or not isinstance(validation, (int, float)) or not 0 <= validation < 1:
        raise ConfigError(f"validation must be a share from 0 to below 1 for a table, got {type(validation).__name__}")
    kind = _KINDS.get(loss) if isinstance(loss, str) else None
    kind = "classification" if class_weight is not None and kind is None else kind
    options = {"kind": kind, "validation_size": validation, "test_size": 0, "batch_size": batch_size, "seed": seed}
    if is_frame(x):
        if y is not None and not isinstance(y, str):
            x, y = _with_column(x, y)
        if y is None:
            raise ConfigError("y must be the name of the column of x to predict, or its values")
        data = TableDataModule.from_frame(x, y, **options)
    else:
        if not isinstance(y, str):
            raise ConfigError(f"y must be the name of the column of {os.fspath(x)} to predict, got {type(y).__name__}")
        data = TableDataModule(str(Path(x)), y, **options)
    data.setup()
    return data


def make_mlp(name: str, data: TableDataModule) -> MLP:
    """Returns the model of a name for a table.

    Raises:
        ConfigError: the name is not ``"mlp"``.
    """
    if name != "mlp":
        raise ConfigError(f"model={name!r} does not take the rows of a table; model='mlp' does")
    return MLP(**sizes_for(MLP, data))


def _with_column(frame: Any, y: Any) -> tuple[Any, str]:
    """Returns a frame with the values ``y`` as a further column, and the name of the column."""
    values = np.asarray(y)
    if values.shape != (len(frame),):
        raise ConfigError(f"y must have one value for each of the {len(frame)} rows of x, got shape {values.shape}")
    name = str(getattr(y, "name", None) or "y")
    while name in map(str, frame.columns):
        name += "_"
    # A frame of the caller's stays as it is.
    frame = frame.copy(deep=False)
    frame[name] = values
    return frame, name
