"""What the report of a forecast shows: forecasts on the series, the error step by step, the intervals in figures."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightkit.app.report.figures import BLUE, GREY, ORANGE, grid, plain, save, styled
from lightkit.app.report.section import Section
from lightkit.data import SeriesDataModule
from lightkit.tasks import ForecastTask

# How many forecasts, one after the other, a row of the figure has room for.
_SHOWN = 6

# How many steps of the horizon the table has lines for.
_LINES = 13


def sections(
    run_dir: Path, task: ForecastTask, data: pl.LightningDataModule, recorded: dict[str, Tensor]
) -> list[Section]:
    """The sections of a test whose ``forecast``, ``target``, ``lower`` and ``upper`` ``(N, horizon)`` were recorded."""
    if not recorded or not isinstance(data, SeriesDataModule):
        return []
    over_time, by_step = forecasts(data, recorded, task.level), error_by_step(data, recorded)
    return [
        Section("Forecasts of the test", figure=save(over_time, run_dir / "forecasts.png")),
        Section("Error by step", figure=save(by_step, run_dir / "error_by_step.png")),
        Section("Step by step", html=step_table(recorded, task.level)),
    ]


@styled
def forecasts(data: SeriesDataModule, recorded: dict[str, Tensor], level: float) -> Figure:
    """The series, and the forecasts from a few origins that follow on one another at the end of the test."""
    origins = data.test.origins[: len(recorded["forecast"])].tolist()
    # From the last one back, each ends where the next begins; a gap may have taken the exact one out.
    chosen: list[int] = []
    for index in reversed(range(len(origins))):
        if len(chosen) < _SHOWN and (not chosen or origins[index] + data.horizon <= origins[chosen[-1]]):
            chosen.append(index)
    begin = max(0, origins[chosen[-1]] - data.history)
    end = origins[chosen[0]] + data.horizon
    figure, axes = grid(10, 4.2, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.plot(range(begin, end), data.series.values[begin:end].numpy(), color="#334155", linewidth=1.3, label="series")
    for number, index in enumerate(reversed(chosen)):
        steps = np.arange(origins[index], origins[index] + data.horizon)
        lower, upper = recorded["lower"][index].numpy(), recorded["upper"][index].numpy()
        first = number == 0
        if np.isfinite(upper).all():
            label = f"{level:.0%} interval" if first else None
            axis.fill_between(steps, lower, upper, color=BLUE, alpha=0.18, linewidth=0, label=label)
        axis.plot(steps, recorded["forecast"][index].numpy(), color=BLUE, label="forecast" if first else None)
        axis.axvline(steps[0] - 0.5, color=GREY, linewidth=0.8, linestyle=":", label="origins" if first else None)
    axis.set(ylabel=plain(data.series.name), xlim=(begin, end - 1))
    _label_times(axis, data, begin, end)
    axis.legend(loc="upper left", ncols=4)
    axis.margins(y=0.18)
    return figure


@styled
def error_by_step(data: SeriesDataModule, recorded: dict[str, Tensor]) -> Figure:
    """The mean absolute error against how far ahead the forecast looks, next to the simplest rules."""
    count = len(recorded["forecast"])
    target = data.test.target[:count]
    lines = {"model": (recorded["forecast"], BLUE), "last value": (data.naive(data.test)[:count], GREY)}
    if data.season is not None:
        lines["last season"] = (data.seasonal_naive(data.test)[:count], ORANGE)
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
    """Mean absolute error, bias, width and coverage of the intervals, by step of the horizon."""
    forecast, target = recorded["forecast"], recorded["target"]
    error = forecast - target
    inside = ((recorded["lower"] <= target) & (target <= recorded["upper"])).float().mean(dim=0)
    half_width = (recorded["upper"] - forecast).mean(dim=0)
    horizon = error.shape[1]
    rows = []
    for step in sorted({round(x) for x in torch.linspace(1, horizon, min(horizon, _LINES)).tolist()}):
        of_step = error[:, step - 1]
        cells = (f"{of_step.abs().mean():.4g}", f"{of_step.mean():+.4g}", f"± {half_width[step - 1]:.4g}")
        rows.append(_row(str(step), *cells, f"{inside[step - 1]:.1%}"))
    mean_width = half_width.mean()
    rows.append(
        _row("all", f"{error.abs().mean():.4g}", f"{error.mean():+.4g}", f"± {mean_width:.4g}", f"{inside.mean():.1%}")
    )
    names = ("steps ahead", "mean absolute error", "bias", f"{level:.0%} interval", "values in it")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<table class="classes"><tr>{head}</tr>{"".join(rows)}</table>'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _label_times(axis: Axes, data: SeriesDataModule, begin: int, end: int) -> None:
    """Says when instead of which row, where the data knows."""
    times = data.series.times
    if times is None:
        axis.set_xlabel("row")
        return
    positions = np.linspace(begin, end - 1, num=7).round().astype(int)
    axis.set_xticks(positions, [plain(times[position]) for position in positions])
