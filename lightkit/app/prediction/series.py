"""Forecasts of the values after the end of a series."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightkit._util.atomic_write import write_text_atomically
from lightkit.app.console import print_table
from lightkit.app.prediction.request import PredictionRequest
from lightkit.data.columns import read_column
from lightkit.data.series import SeriesDataModule
from lightkit.errors import ConfigError, DataError
from lightkit.tasks import ForecastTask

# Arguments of `read_column` that a data module may have as attributes, and their defaults.
_COLUMN_DEFAULTS = {"column": None, "time_column": None, "missing": "error"}


@dataclass(frozen=True)
class ForecastStep:
    """The forecast of one step and its interval.

    Args:
        step: the number of steps after the end of the series, from 1.
        forecast: the point forecast, in the unit of the series.
        lower: the lower end of the interval.
        upper: the upper end of the interval.
    """

    step: int
    forecast: float
    lower: float
    upper: float


class Forecast:
    """The forecast of the next values of a series.

    Args:
        name: the name of the series.
        level: the nominal coverage of the intervals, from 0 to 1.
        steps: the forecast of each step.
    """

    def __init__(self, name: str, level: float, steps: list[ForecastStep]) -> None:
        self.name = name
        self.level = level
        self.steps = steps

    def show(self) -> None:
        """Prints all steps."""
        rows = {f"+{s.step}": f"{s.forecast:.6g}  ({s.lower:.6g} to {s.upper:.6g})" for s in self.steps}
        print_table(f"{self.name}: forecast ({self.level:.0%} interval)", rows)

    def write(self, path: Path) -> None:
        """Writes all steps as CSV."""
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "forecast", "lower", "upper"])
            writer.writerows([s.step, s.forecast, s.lower, s.upper] for s in self.steps)
            write_text_atomically(path, file.getvalue())


def predict(task: ForecastTask, data: pl.LightningDataModule, request: PredictionRequest) -> Forecast:
    """Forecasts the values after the last row of a CSV file, at most as far ahead as the model was trained for.

    A longer forecast would feed the model its own forecasts, and the level of its intervals would be unknown.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint, which says how to read the file.
        request: the request, of which the function reads ``input``, ``column`` and ``horizon``.

    Raises:
        ConfigError: an option is wrong, or the data module has no series.
        DataError: the file cannot be read, or has too few rows.
    """
    if not isinstance(data, SeriesDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not a series")
    horizon = task.horizon if request.horizon is None else request.horizon
    if not 1 <= horizon <= task.horizon:
        advice = f"; to see further, train with data.horizon={horizon}" if horizon > task.horizon else ""
        raise ConfigError(f"horizon must be from 1 to {task.horizon}, got {horizon}{advice}")
    # The options for the training file apply to this file too.
    column_options: dict[str, Any] = {name: getattr(data, name, default) for name, default in _COLUMN_DEFAULTS.items()}
    if request.column is not None:
        column_options["column"] = request.column
    series = read_column(request.require_input("series"), **column_options)
    if len(series) < data.history:
        raise DataError(f"{request.input} has {len(series)} rows, but the model forecasts from {data.history}")
    with torch.inference_mode():
        output = task.predict_step(series.values[-data.history :].reshape(1, -1, 1), 0)
    columns = [output[name][0, :horizon].tolist() for name in ("forecast", "lower", "upper")]
    steps = [ForecastStep(number, *values) for number, values in enumerate(zip(*columns, strict=True), start=1)]
    return Forecast(series.name, task.level, steps)
