"""Series: the last values as a list of JSON, or a CSV file with a column of values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit.app.prediction.series import ForecastStep, check_horizon, column_options, forecast, table_settings
from lightkit.app.serving.bodies import is_json, one_of, read_object, shown, take_options
from lightkit.app.serving.kinds.csv_options import CSV_OPTIONS, CSV_TYPES
from lightkit.app.serving.kinds.kind import Kind, device_of
from lightkit.app.serving.messages import Request, RequestError
from lightkit.data.columns import check_missing, close_gaps, column_of
from lightkit.data.series import SeriesDataModule
from lightkit.data.tables import parse_csv
from lightkit.errors import DataError
from lightkit.tasks import ForecastTask

_FILE_OPTIONS: dict[str, Any] = {
    "column": {"type": "string", "description": "CSV: the column of the values."},
    "time_column": {"type": "string", "description": "CSV: the column of times."},
    **CSV_OPTIONS,
}


@dataclass(frozen=True)
class SeriesSample:
    """The values from which a request wants a forecast.

    Attributes:
        history: float64 ``(history)``.
        name: the name of the series; None without one.
        horizon: the number of steps; None for all of the model.
        notes: how a CSV file was read.
    """

    history: Tensor
    name: str | None
    horizon: int | None
    notes: list[str]


class Histories(Kind):
    """Series of which the model forecasts the next values.

    Args:
        task: the task in evaluation mode.
        data: the data module, which has the length of a history and says how a CSV file is read.
    """

    name = "series"
    media_types = CSV_TYPES
    file_options = _FILE_OPTIONS

    def __init__(self, task: ForecastTask, data: SeriesDataModule) -> None:
        self._task = task
        self._data = data
        self.options = {
            "horizon": {
                "type": "integer",
                "minimum": 1,
                "maximum": task.horizon,
                "description": "The number of steps to forecast.",
            },
            "missing": {
                "type": "string",
                "enum": ["error", "interpolate", "drop"],
                "description": "The fate of gaps: error rejects them, interpolate fills them, drop leaves them out.",
            },
        }

    def about(self) -> dict[str, Any]:
        """Returns the number of values that a forecast needs, that of its steps, and the level of its intervals."""
        form = {"history": self._data.history, "horizon": self._task.horizon}
        return {"input": form, "level": self._task.level, "classes": None}

    def content_schema(self) -> dict[str, Any]:
        """Returns the schema of the values."""
        return {
            "values": {
                "type": "array",
                "items": {"type": ["number", "null"]},
                "minItems": self._data.history,
                "description": f"The values in the order of time, the last {self._data.history} or more. null is a "
                "gap: see missing.",
            }
        }

    def example(self) -> dict[str, Any]:
        """Returns a series that climbs."""
        return {"values": [float(value) for value in range(1, self._data.history + 1)]}

    def decode(self, request: Request) -> SeriesSample:
        """Returns the history of a request: see `Kind.decode`."""
        if is_json(request, self.media_types):
            fields = read_object(request.body)
            one_of(fields, ("values",))
            options = take_options(fields, request.query, tuple(self.options), ("values",))
            check_horizon(self._task, options)
            missing = column_options(self._data, options).get("missing", "error")
            check_missing(missing)
            values, name, notes = _close(_to_array(fields["values"]), missing), None, []
        else:
            options = take_options({}, request.query, (*self.options, *self.file_options))
            check_horizon(self._task, options)
            table = parse_csv(request.body, table_settings(self._data, options), Path("the table"))
            column = column_of(table, **column_options(self._data, options))
            values, name, notes = column.values, column.name, list(column.notes)
        if len(values) < self._data.history:
            raise DataError(f"the series has {len(values)} values, but the model forecasts from {self._data.history}")
        return SeriesSample(values[-self._data.history :], name, options.horizon, notes)

    def predict(self, samples: list[SeriesSample]) -> list[list[ForecastStep]]:
        """Returns the forecast of each series, as many steps as the model has."""
        histories = torch.stack([sample.history for sample in samples]).unsqueeze(2)
        return forecast(self._task, histories.to(device_of(self._task)))

    def encode(self, sample: SeriesSample, output: list[ForecastStep]) -> dict[str, Any]:
        """Returns the steps of the forecast with their intervals, and notes if there are any."""
        name = {} if sample.name is None else {"name": sample.name}
        notes = {"notes": sample.notes} if sample.notes else {}
        return {
            **name,
            "level": self._task.level,
            "forecast": [asdict(step) for step in output[: sample.horizon]],
            **notes,
        }


def _to_array(values: Any) -> np.ndarray:
    """Returns the values of a request as a float64 array ``(T)``, NaN for a gap."""
    if not isinstance(values, list):
        raise RequestError(400, f"values must be a list of numbers, got {shown(values)}")
    for index, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RequestError(400, f"values[{index}] must be a number or null, got {shown(value)}")
    try:
        array = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    except OverflowError as error:
        raise RequestError(400, "values must be numbers below 1.8e308, got a larger one") from error
    if np.isinf(array).any():
        raise RequestError(400, f"values[{int(np.isinf(array).argmax())}] must be finite, got a number above 1.8e308")
    return array


def _close(values: np.ndarray, missing: str) -> Tensor:
    if len(values) == 0:
        raise RequestError(400, "values must have numbers, got an empty list")
    closed, _, _ = close_gaps(values, None, missing, "values", lambda index: f"values[{index % len(values)}] is null")
    return closed
