"""Forecasts of the values after the end of a series."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.numbers import format_number, format_percentage
from lightkit.app.console import print_table
from lightkit.app.prediction.output import is_json, write_json, write_rows
from lightkit.app.prediction.request import COLUMN_FIELDS, TABLE_FIELDS, PredictionRequest
from lightkit.data.columns import describe, read_column
from lightkit.data.series import SeriesDataModule
from lightkit.data.tables import TableSettings
from lightkit.errors import ConfigError, DataError
from lightkit.tasks import ForecastTask


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
        rows = {f"+{s.step}": _interval(s) for s in self.steps}
        print_table(f"{self.name}: forecast ({format_percentage(self.level)} interval)", rows)

    def write(self, path: Path) -> None:
        """Writes all steps: as JSON to a file whose suffix is that of JSON, else as CSV."""
        header = [field.name for field in fields(ForecastStep)]
        if is_json(path):
            write_json(path, [asdict(step) for step in self.steps])
        else:
            write_rows(path, header, [astuple(step) for step in self.steps])


def _interval(step: ForecastStep) -> str:
    """Returns a forecast and its interval for the terminal."""
    return f"{format_number(step.forecast)}  ({format_number(step.lower)} to {format_number(step.upper)})"


def predict(task: ForecastTask, data: pl.LightningDataModule, request: PredictionRequest) -> Forecast:
    """Forecasts the values after the last row of a table, at most as far ahead as the model was trained for.

    A longer forecast would feed the model its own forecasts, and the level of its intervals would be unknown.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint, which says how to read the file.
        request: the request, of which the function reads ``input``, ``horizon`` and the fields of a series.

    Raises:
        ConfigError: an option is wrong, or the data module has no series.
        DataError: the file cannot be read, or has too few rows.
    """
    if not isinstance(data, SeriesDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not a series")
    check_horizon(task, request)
    path = request.require_input("series")
    series = read_column(path, **column_options(data, request), settings=table_settings(data, request))
    if series.notes:
        print(describe(path, series), flush=True)
    if len(series) < data.history:
        raise DataError(f"{path} has {len(series)} rows, but the model forecasts from {data.history}")
    (steps,) = forecast(task, series.values[-data.history :].reshape(1, -1, 1))
    return Forecast(series.name, task.level, steps[: request.horizon])


def check_horizon(task: ForecastTask, request: PredictionRequest) -> None:
    """Checks the field ``horizon`` of a request.

    Raises:
        ConfigError: it is below 1, or above the horizon of the task.
    """
    horizon = task.horizon if request.horizon is None else request.horizon
    if not 1 <= horizon <= task.horizon:
        advice = f"; to see further, train with data.horizon={horizon}" if horizon > task.horizon else ""
        raise ConfigError(f"horizon must be from 1 to {task.horizon}, got {horizon}{advice}")


@torch.inference_mode()
def forecast(task: ForecastTask, histories: Tensor) -> list[list[ForecastStep]]:
    """Forecasts the values after each of several histories, as many steps as the task has.

    Args:
        task: the task in evaluation mode.
        histories: float64 ``(N, history, 1)``; the model computes on their device.
    """
    output = task.predict_step(histories, 0)
    columns = [output[name].tolist() for name in ("forecast", "lower", "upper")]
    return [
        [ForecastStep(number, *values) for number, values in enumerate(zip(*series, strict=True), start=1)]
        for series in zip(*columns, strict=True)
    ]


def column_options(data: SeriesDataModule, request: PredictionRequest) -> dict[str, Any]:
    """Returns arguments of `read_column`: those of the training, except for what a request says."""
    options: dict[str, Any] = {name: getattr(data, name, None) for name in COLUMN_FIELDS}
    options |= request.given(COLUMN_FIELDS)
    if options["missing"] is None:
        del options["missing"]
    return options


def table_settings(data: SeriesDataModule, request: PredictionRequest) -> TableSettings:
    """Returns the settings of a table: those of the training, except for what a request says."""
    return replace(getattr(data, "settings", TableSettings()), **request.given(TABLE_FIELDS))
