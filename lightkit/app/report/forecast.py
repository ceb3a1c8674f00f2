"""Report sections of a forecast: forecasts over time, the error of each step, and a table of the intervals."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightkit._util.numbers import format_number, format_percentage
from lightkit.app.report.figures import BLUE, GREY, ORANGE, escape_name, escape_names, grid, save, styled
from lightkit.app.report.section import Section, make_section
from lightkit.data import SeriesDataModule
from lightkit.data.columns import Column
from lightkit.data.series import Windows
from lightkit.tasks import ForecastTask

# The largest number of consecutive forecasts in the figure.
_MAX_FORECASTS = 6

# The largest number of steps of the horizon in the table.
_MAX_TABLE_ROWS = 13


def sections(
    run_dir: Path, task: ForecastTask, data: pl.LightningDataModule, recorded: dict[str, Tensor]
) -> list[Section]:
    """Returns the report sections about the test of a forecast, and writes their figures into ``run_dir``.

    Args:
        run_dir: the directory for the figures.
        task: the trained task.
        data: the data module after `setup`; without a series the function returns an empty list.
        recorded: a dict with the keys ``forecast``, ``target``, ``lower`` and ``upper``, each ``(N, horizon)``, of the
            first N windows of the test set. For an empty dict the function returns an empty list.
    """
    if not recorded or not isinstance(data, SeriesDataModule):
        return []

    def over_time() -> Path | None:
        return save(forecasts(data, recorded, task.level), run_dir / "forecasts.png")

    def by_step() -> Path | None:
        return save(error_by_step(data, recorded), run_dir / "error_by_step.png")

    return [
        *make_section("Forecasts of the test", over_time),
        *make_section("Error by step", by_step),
        *make_section("Step by step", lambda: step_table(recorded, task.level)),
    ]


@styled
def forecasts(data: SeriesDataModule, recorded: dict[str, Tensor], level: float) -> Figure:
    """Draws the series and consecutive forecasts at the end of the test set.

    Args:
        data: the data module after `setup`.
        recorded: the recorded tensors by name, as in `sections`.
        level: the nominal coverage of the intervals, from 0 to 1.
    """
    series, test = _series_and_test(data)
    origins = test.origins[: len(recorded["forecast"])].tolist()
    # Backwards from the last forecast, each forecast ends at or before the origin of the next: a gap in the series may
    # leave no forecast that ends exactly there.
    chosen: list[int] = []
    for index in reversed(range(len(origins))):
        if len(chosen) < _MAX_FORECASTS and (not chosen or origins[index] + data.horizon <= origins[chosen[-1]]):
            chosen.append(index)
    begin = max(0, origins[chosen[-1]] - data.history)
    end = origins[chosen[0]] + data.horizon
    figure, axes = grid(10, 4.2, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.plot(range(begin, end), series.values[begin:end].numpy(), color="#334155", linewidth=1.3, label="series")
    for number, index in enumerate(reversed(chosen)):
        steps = np.arange(origins[index], origins[index] + data.horizon)
        lower, upper = recorded["lower"][index].numpy(), recorded["upper"][index].numpy()
        first = number == 0
        if np.isfinite(upper).all():
            label = f"{format_percentage(level)} interval" if first else None
            axis.fill_between(steps, lower, upper, color=BLUE, alpha=0.18, linewidth=0, label=label)
        axis.plot(steps, recorded["forecast"][index].numpy(), color=BLUE, label="forecast" if first else None)
        axis.axvline(steps[0] - 0.5, color=GREY, linewidth=0.8, linestyle=":", label="origins" if first else None)
    axis.set(ylabel=escape_name(series.name), xlim=(begin, end - 1))
    _label_times(axis, series, begin, end)
    axis.legend(loc="upper left", ncols=4)
    axis.margins(y=0.18)
    return figure


@styled
def error_by_step(data: SeriesDataModule, recorded: dict[str, Tensor]) -> Figure:
    """Draws the mean absolute error over the steps ahead, for the model and for the naive forecasts.

    Args:
        data: the data module after `setup`.
        recorded: the recorded tensors by name, as in `sections`.
    """
    count = len(recorded["forecast"])
    _, test = _series_and_test(data)
    target = test.target[:count]
    lines = {"model": (recorded["forecast"], BLUE), "last value": (data.naive(test)[:count], GREY)}
    if data.season is not None:
        lines["last season"] = (data.seasonal_naive(test)[:count], ORANGE)
    figure, axes = grid(7, 3.8, nrows=1, ncols=1)
    axis = axes[0, 0]
    steps = range(1, data.horizon + 1)
    for name, (forecast, color) in lines.items():
        error = (forecast - target).abs().mean(dim=0)
        axis.plot(steps, error.numpy(), color=color, marker="o", markersize=3.5, label=name)
    axis.set(xlabel="steps ahead", ylabel="mean absolute error", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def step_table(recorded: dict[str, Tensor], level: float) -> str:
    """Returns an HTML table of mean absolute error, bias, and width and coverage of the intervals, by step.

    Args:
        recorded: the recorded tensors by name, as in `sections`.
        level: the nominal coverage of the intervals, from 0 to 1.
    """
    forecast, target = recorded["forecast"], recorded["target"]
    error = forecast - target
    inside = ((recorded["lower"] <= target) & (target <= recorded["upper"])).float().mean(dim=0)
    half_width = (recorded["upper"] - forecast).mean(dim=0)
    horizon = error.shape[1]
    rows = []
    for step in sorted({round(x) for x in torch.linspace(1, horizon, min(horizon, _MAX_TABLE_ROWS)).tolist()}):
        of_step = error[:, step - 1]
        rows.append(_table_row(str(step), of_step, half_width[step - 1], inside[step - 1]))
    rows.append(_table_row("all", error, half_width.mean(), inside.mean()))
    names = ("steps ahead", "mean absolute error", "bias", f"{format_percentage(level)} interval", "values in it")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<table class="classes"><tr>{head}</tr>{"".join(rows)}</table>'


def _table_row(name: str, error: Tensor, half_width: Tensor, inside: Tensor) -> str:
    """Returns a row of the table of steps.

    Args:
        name: the text of the first cell.
        error: the errors of the forecasts.
        half_width: a scalar, the mean half width of the intervals.
        inside: a scalar, the share of the values in their intervals.
    """
    bias = float(error.mean())
    cells = (
        *(name, format_number(float(error.abs().mean())), f"{'+' if bias > 0 else ''}{format_number(bias)}"),
        *(f"± {format_number(float(half_width))}", f"{float(inside):.1%}"),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _series_and_test(data: SeriesDataModule) -> tuple[Column, Windows]:
    """Returns the series and the test windows of a data module after `setup`."""
    assert data.series is not None and data.test is not None, "call setup first"
    return data.series, data.test


def _label_times(axis: Axes, series: Column, begin: int, end: int) -> None:
    """Labels the x axis of a figure with times, or with row numbers if the series has no times.

    Args:
        axis: the axes of the figure, whose x values are row numbers.
        series: the series.
        begin: the index of the first row in the figure.
        end: the index after the last row.
    """
    times = series.times
    if times is None:
        axis.set_xlabel("row")
        return
    positions = np.linspace(begin, end - 1, num=7).round().astype(int)
    axis.set_xticks(positions, escape_names(times[position] for position in positions))
