"""Rows of a table: as JSON objects with the names of columns, or as a CSV file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit.app.prediction.request import TABLE_FIELDS
from lightkit.app.prediction.table import TablePredictions, predict_rows
from lightkit.app.serving.bodies import is_json, one_of, read_object, shown, take_options
from lightkit.app.serving.kinds.csv_options import CSV_OPTIONS, CSV_TYPES
from lightkit.app.serving.kinds.kind import Kind, device_of
from lightkit.app.serving.messages import Request, RequestError
from lightkit.data.tables import Table, parse_csv
from lightkit.data.tabular import TableDataModule, TableEncoding, records_to_table


@dataclass(frozen=True)
class TableSample:
    """The rows of a request.

    Attributes:
        inputs: the encoded rows: see `TableDataModule.encode`.
        lines: the place of each row.
        notes: what is unknown in the rows, and how a CSV file was read.
    """

    inputs: tuple[Tensor, ...]
    lines: list[str]
    notes: list[str]


class Tables(Kind):
    """Rows, of which the model predicts one column.

    Args:
        task: the task in evaluation mode, of classes or of numbers.
        data: the data module with the encoding of the columns.
    """

    name = "tables"
    media_types = CSV_TYPES
    file_options = CSV_OPTIONS

    def __init__(self, task: Any, data: TableDataModule) -> None:
        self._task = task
        self._data = data

    @property
    def _encoding(self) -> TableEncoding:
        assert self._data.fitted is not None, "lightkit.app.restore loads the encoding"
        return self._data.fitted

    def about(self) -> dict[str, Any]:
        """Returns the names and kinds of the columns, the target and the classes."""
        # An ensemble has a feature for each of its models.
        columns = {feature.name: feature.kind for feature in self._encoding.features}
        classes = self._encoding.classes
        return {
            "input": {"columns": columns},
            "target": self._encoding.target,
            "classes": None if classes is None else list(classes),
        }

    def content_schema(self) -> dict[str, Any]:
        """Returns the schema of the rows."""
        types = {"number": ["number", "string"], "date": ["string"], "category": ["string", "number", "boolean"]}
        columns = {feature.name: {"type": [*types[feature.kind], "null"]} for feature in self._encoding.features}
        return {
            "rows": {
                "type": "array",
                "items": {"type": "object", "properties": columns, "required": list(columns)},
                "description": "The rows. A column must occur in one row at least; null and a missing column are gaps.",
            }
        }

    def example(self) -> dict[str, Any]:
        """Returns a row of gaps."""
        return {"rows": [dict.fromkeys(feature.name for feature in self._encoding.features)]}

    def decode(self, request: Request) -> TableSample:
        """Returns the encoded rows of a request: see `Kind.decode`."""
        if is_json(request, self.media_types):
            fields = read_object(request.body)
            one_of(fields, ("rows",))
            take_options(fields, request.query, tuple(self.options), ("rows",))
            if not isinstance(fields["rows"], list):
                raise RequestError(400, f"rows must be a list of objects, got {shown(fields['rows'])}")
            return self._encode(records_to_table(fields["rows"]))
        options = take_options({}, request.query, tuple(self.file_options))
        settings = replace(self._data.settings, **options.given(TABLE_FIELDS))
        return self._encode(parse_csv(request.body, settings, Path("the table")))

    def _encode(self, table: Table) -> TableSample:
        inputs, notes = self._data.encode_rows(table)
        return TableSample(inputs, [table.line(row) for row in range(len(table))], [*table.notes, *notes])

    def predict(self, samples: list[TableSample]) -> list[Tensor]:
        """Returns the probabilities ``(R, C)`` or the numbers ``(R, 1)`` of the rows of each sample."""
        parts = zip(*(sample.inputs for sample in samples), strict=True)
        inputs = [torch.cat(tensors).to(device_of(self._task)) for tensors in parts]
        values = predict_rows(self._task, self._data, inputs).cpu()
        return list(values.split([len(sample.lines) for sample in samples]))

    def encode(self, sample: TableSample, output: Tensor) -> dict[str, Any]:
        """Returns the prediction of each row, and notes if there are any."""
        found = TablePredictions(self._encoding.target, self._encoding.classes, output, sample.lines)
        notes = {"notes": sample.notes} if sample.notes else {}
        return {"target": found.target, "predictions": found.entries(), **notes}
