"""Predictions for the rows of a table: a class with the probabilities of all classes, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit._util.numbers import format_number, format_percentage
from lightkit._util.printable import printable
from lightkit.app.console import print_table
from lightkit.app.prediction.output import is_json, write_json, write_rows
from lightkit.app.prediction.request import TABLE_FIELDS, PredictionRequest
from lightkit.data import TableDataModule
from lightkit.errors import CheckpointError
from lightkit.tasks import ClassificationTask, RegressionTask

# The number of predictions that the terminal shows; a file gets all.
_MAX_ROWS = 20

_DEFAULT_BATCH_SIZE = 4096


class TablePredictions:
    """The predictions for the rows of a table.

    Args:
        target: the name of the predicted column.
        classes: the names of the classes; None for numbers.
        values: the probabilities ``(R, C)`` of the classes, or the numbers ``(R, 1)``.
        lines: the place of each row in its file, such as ``line 2``.
    """

    def __init__(self, target: str, classes: Sequence[str] | None, values: Tensor, lines: Sequence[str]) -> None:
        self.target = target
        self.classes = None if classes is None else tuple(classes)
        self.values = values
        self.lines = lines

    def predicted(self) -> list[str] | list[float]:
        """Returns the name of the most probable class of each row, or the number."""
        if self.classes is None:
            return self.values[:, 0].tolist()
        return [str(self.classes[index]) for index in self.values.argmax(dim=1).tolist()]

    def show(self) -> None:
        """Prints the first predictions."""
        rows: dict[str, str] = {}
        for line, found, values in zip(self.lines, self.predicted()[:_MAX_ROWS], self.values, strict=False):
            if isinstance(found, str):
                rows[line] = f"{printable(found)}  ({format_percentage(float(values.max()))})"
            else:
                rows[line] = format_number(found)
        if len(self.values) > _MAX_ROWS:
            rows["..."] = f"and {len(self.values) - _MAX_ROWS:,} more; output=FILE.csv has them all"
        print_table(f"predictions of {printable(self.target)}", rows)

    def write(self, path: Path) -> None:
        """Writes all predictions: as JSON to a file whose suffix is that of JSON, else as CSV.

        A row of the CSV file has the number of the row, from 1; the prediction; and for classes the probability of the
        prediction and that of each class. An entry of the JSON list has the same.
        """
        if is_json(path):
            write_json(path, self.entries())
            return
        rows = enumerate(zip(self.predicted(), self.values, strict=True), start=1)
        names = [] if self.classes is None else ["probability", *(f"probability of {name}" for name in self.classes)]
        shares = (lambda values: []) if self.classes is None else lambda values: [float(values.max()), *values.tolist()]
        cells = ([number, found, *shares(values)] for number, (found, values) in rows)
        write_rows(path, ["row", self.target, *names], cells)

    def entries(self) -> list[dict[str, Any]]:
        """Returns a dict for each row: its number, the prediction, and of classes the probabilities."""
        rows = enumerate(zip(self.predicted(), self.values, strict=True), start=1)
        return [self._entry(number, found, values) for number, (found, values) in rows]

    def _entry(self, number: int, found: str | float, values: Tensor) -> dict[str, Any]:
        entry: dict[str, Any] = {"row": number, "prediction": found}
        if self.classes is not None:
            shares = dict(zip(self.classes, values.tolist(), strict=True))
            entry |= {"probability": float(values.max()), "probabilities": shares}
        return entry


def predict(
    task: ClassificationTask | RegressionTask, data: TableDataModule, request: PredictionRequest
) -> TablePredictions:
    """Predicts the target of each row of a table, which need not have the column of the target.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint with its encoding.
        request: the request, of which the function reads ``input``, ``batch_size`` and the settings of a table.

    Raises:
        CheckpointError: the model has another number of outputs than the data have classes.
        ConfigError: an option is wrong.
        DataError: the table cannot be read, or has not the columns of the training.
    """
    assert data.fitted is not None, "lightkit.app.restore loads the encoding"
    batch_size = request.batch_size_or(_DEFAULT_BATCH_SIZE)
    data.settings = replace(data.settings, **request.given(TABLE_FIELDS))
    table = data.read(request.require_input("table"))
    values = predict_rows(task, data, data.encode(table), batch_size)
    return TablePredictions(data.fitted.target, data.classes, values, [table.line(row) for row in range(len(table))])


@torch.inference_mode()
def predict_rows(
    task: ClassificationTask | RegressionTask,
    data: TableDataModule,
    inputs: Sequence[Tensor],
    batch_size: int = _DEFAULT_BATCH_SIZE,
) -> Tensor:
    """Predicts the target of encoded rows.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint.
        inputs: the rows as `TableDataModule.encode` returns them; the model computes on their device.
        batch_size: the number of rows in a batch.

    Returns:
        The probabilities ``(R, C)`` of the classes, or the numbers ``(R, 1)``.

    Raises:
        CheckpointError: the model has another number of outputs than the data have classes.
    """
    parts = [
        task.predict_step((*(tensor[begin : begin + batch_size] for tensor in inputs), torch.empty(0)), 0)
        for begin in range(0, len(inputs[0]), batch_size)
    ]
    values, classes = torch.cat(parts), data.classes
    if values.shape[1] != (1 if classes is None else len(classes)):
        raise CheckpointError(f"the model of the checkpoint has {values.shape[1]} outputs, which its data do not have")
    return values
