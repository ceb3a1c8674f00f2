"""Forecasts what comes after the end of a series."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from lightkit._util.atomic_write import write_text_atomically
from lightkit.app.console import print_table
from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.restore import Restored
from lightkit.data.columns import read_column
from lightkit.data.series import SeriesDataModule
from lightkit.errors import ConfigError, DataError

# What a data module may have been told about its file, and what holds where it was not.
_TOLD = {"column": None, "time_column": None, "missing": "error"}


@dataclass(frozen=True)
class Step:
    """The forecast so many steps after the end, and the interval around it."""

    step: int
    forecast: float
    lower: float
    upper: float


class Forecast:
    """The next values of a series."""

    def __init__(self, name: str, level: float, steps: list[Step]) -> None:
        self.name = name
        self.level = level
        self.steps = steps

    def show(self) -> None:
        """Prints all of them."""
        rows = {f"+{s.step}": f"{s.forecast:.6g}  ({s.lower:.6g} to {s.upper:.6g})" for s in self.steps}
        print_table(f"{self.name}: forecast ({self.level:.0%} interval)", rows)

    def write(self, path: Path) -> None:
        """Writes CSV."""
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "forecast", "lower", "upper"])
            writer.writerows([s.step, s.forecast, s.lower, s.upper] for s in self.steps)
            write_text_atomically(path, file.getvalue())


def predict(restored: Restored, request: PredictionRequest) -> Forecast:
    """Forecasts the values after the last row of a CSV file.

    No further than the model was trained for: its own forecasts fed back to it would have intervals of no known
    level.
    """
    task, data = restored.task, restored.build_data()
    if not isinstance(data, SeriesDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not a series")
    horizon = task.horizon if request.horizon is None else request.horizon
    if not 1 <= horizon <= task.horizon:
        advice = f"; to see further, train with data.horizon={horizon}" if horizon > task.horizon else ""
        raise ConfigError(f"horizon must be from 1 to {task.horizon}, got {horizon}{advice}")
    # What training was told about its file holds for this one, too.
    told = {name: getattr(data, name, default) for name, default in _TOLD.items()}
    if request.column is not None:
        told["column"] = request.column
    series = read_column(request.input, **told)
    if len(series) < data.history:
        raise DataError(f"{request.input} has {len(series)} rows, but the model forecasts from {data.history}")
    with torch.inference_mode():
        found = task.predict_step(series.values[-data.history :].reshape(1, -1, 1), 0)
    columns = [found[name][0, :horizon].tolist() for name in ("forecast", "lower", "upper")]
    steps = [Step(number, *values) for number, values in enumerate(zip(*columns, strict=True), start=1)]
    return Forecast(series.name, task.level, steps)
