"""Data modules of a series in memory: windows of its history and of the values that follow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, after_setup, shard_kwargs, to_training_device
from lightkit.data.columns import Column, read_column
from lightkit.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Samples of a series in the order of time and in the units of the series.

    Attributes:
        history: float64 ``(N, history, 1)``.
        target: float64 ``(N, horizon)``, the values after the history.
        origins: int64 ``(N)``, the index in the series at which each target begins.
    """

    history: Tensor
    target: Tensor
    origins: Tensor

    def __len__(self) -> int:
        return len(self.origins)


def cut_windows(series: Column, history: int, horizon: int, begin: int, end: int) -> Windows:
    """Returns all windows whose targets lie in ``[begin, end)``; their histories may begin before.

    A window is left out if a value of its target, or the last value of its history, was not measured. No model is then
    tested on an interpolated value. No history knows the future either: a gap is interpolated towards the value after
    it, which would be in the target.
    """
    begin = max(begin, history)
    first = torch.arange(begin, max(begin, end - horizon + 1))
    if len(first) == 0:
        return Windows(torch.empty(0, history, 1), torch.empty(0, horizon), first)
    # The windows are views of the series; a batch copies its windows.
    part = series.values[begin - history : end]
    windows = part.unfold(0, history + horizon, 1)
    known = series.measured[begin - 1 : end].unfold(0, 1 + horizon, 1).all(dim=1)
    if not known.all():
        windows, first = windows[known], first[known]
    return Windows(windows[:, :history].unsqueeze(2), windows[:, history:], first)


class SeriesDataModule(pl.LightningDataModule):
    """A data module of windows of a series: ``history`` values ``(N, history, 1)``, the next ``(N, horizon)``.

    The series is split in the order of time into training, validation and test. The history of a window may reach into
    the part before, as in a real forecast; its target lies in its own part. Values are float64 in the units of the
    series. The task learns their scale from the training part only (`scale`) and keeps it with the weights. For gaps
    see `cut_windows`. A subclass defines `read`.

    Args:
        history: the values that a forecast is made from.
        horizon: the values that are forecast.
        season: the values after which the series roughly repeats; None if it does not.
        validation_size: the size of the part before the test: a number of values, or below 1 a share of the series.
        test_size: the size of the last part, in the same form.
        batch_size: windows in a batch of training.
        eval_batch_size: windows in a batch of validation and test; it changes the speed only.
        seed: the seed of the order of training.

    Raises:
        DataError: an argument is out of its range, or `setup` finds a part without a window.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
    unit = "windows"

    def __init__(
        self,
        history: int,
        horizon: int,
        season: int | None = None,
        validation_size: float = 0.15,
        test_size: float = 0.15,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive = {
            "history": history,
            "horizon": horizon,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
        }
        if season is not None:
            positive["season"] = season
        for name, value in positive.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        if season is not None and season > history:
            raise DataError(f"history is {history}, which must hold at least one season of {season}")
        for name, value in {"validation_size": validation_size, "test_size": test_size}.items():
            if value <= 0 or (value >= 1 and value != int(value)):
                raise DataError(f"{name} must be a share below 1 or a whole number of values, got {value}")
        self.history = history
        self.horizon = horizon
        self.season = season
        self.validation_size = validation_size
        self.test_size = test_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.series: Column | None = None
        self.train: Windows | None = None
        self.validation: Windows | None = None
        self.test: Windows | None = None

    @abstractmethod
    def read(self) -> Column:
        """Reads the whole series."""

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the series, once."""
        if self.series is not None:
            return
        series = self.read()
        total = len(series)
        held_out = [size if size >= 1 else round(total * size) for size in (self.validation_size, self.test_size)]
        validation, test = total - int(sum(held_out)), total - int(held_out[1])
        parts = {"training": (0, validation), "validation": (validation, test), "test": (test, total)}
        cut = {}
        for name, (begin, end) in parts.items():
            cut[name] = cut_windows(series, self.history, self.horizon, begin, end)
            if len(cut[name]) == 0:
                raise DataError(
                    f"{type(self).__name__}: of {total} values the {name} part has {max(end - begin, 0)}, too few for "
                    f"one window without a gap: history={self.history} and horizon={self.horizon} come to "
                    f"{self.history + self.horizon}, of which the horizon must lie in the part"
                )
        self.train, self.validation, self.test = cut["training"], cut["validation"], cut["test"]
        self._training_values = series.values[:validation][series.measured[:validation]]
        self.series = series

    def scale(self, relative: bool = False) -> tuple[Tensor, Tensor]:
        """Returns center and scale of the training part, float64 scalars.

        Args:
            relative: True returns zero and the root mean square of the differences between the targets and the last
                value of their history; False returns mean and standard deviation of the measured values.

        Raises:
            DataError: the training part is constant.
        """
        name = after_setup(self.series).name
        values = self._training_values
        center, scale = values.mean(), values.std(correction=0)
        if relative:
            train = after_setup(self.train)
            last = train.history[:, -1, 0]
            # One step of the horizon at a time: all differences at once take many times the memory of the series.
            squares = torch.stack([(step - last).square().mean() for step in train.target.unbind(dim=1)])
            center, scale = torch.zeros_like(center), squares.mean().sqrt()
        # A tolerance: rounding may give equal numbers a mean that differs from them.
        if scale <= 1e-12 * values.abs().max():
            raise DataError(f"{type(self).__name__}: column {name} does not vary in the training part")
        return center, scale

    def baselines(self) -> dict[str, float]:
        """Returns MAE and RMSE of naive forecasts on the targets of the test, in the units of the series.

        ``naive`` repeats the last value; ``seasonal_naive``, if there is a season, repeats the last season.
        """
        test = after_setup(self.test)
        errors = {"naive": self.naive(test) - test.target}
        if self.season is not None:
            errors["seasonal_naive"] = self.seasonal_naive(test) - test.target
        found = {f"{name}_mae": error.abs().mean().item() for name, error in errors.items()}
        return found | {f"{name}_rmse": error.square().mean().sqrt().item() for name, error in errors.items()}

    def naive(self, windows: Windows) -> Tensor:
        """Returns the last value of each history for the whole horizon: ``(N, horizon)``."""
        return windows.history[:, -1].expand(-1, self.horizon)

    def seasonal_naive(self, windows: Windows) -> Tensor:
        """Returns the last season of each history, repeated over the horizon: ``(N, horizon)``.

        Raises:
            ValueError: there is no ``season``.
        """
        season = self.season
        if season is None:
            raise ValueError("the series has no season")
        steps = torch.arange(self.horizon) % season
        return windows.history[:, self.history - season + steps, 0]

    def _batches(self, windows: Windows, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return TensorBatches(
            to_training_device(self.trainer, (windows.history, windows.target)),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )

    def train_dataloader(self) -> TensorBatches:
        """Returns shuffled batches of the training part."""
        return self._batches(after_setup(self.train), self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches:
        """Returns batches of the validation part in order."""
        return self._batches(after_setup(self.validation), self.eval_batch_size)

    def test_dataloader(self) -> TensorBatches:
        """Returns batches of the test part in order."""
        return self._batches(after_setup(self.test), self.eval_batch_size)


class Series(SeriesDataModule):
    """A data module of a column of a CSV file: see `lightkit.data.columns.read_column`.

    Args:
        path: the file; its first line names the columns, its rows are in the order of time.
        column: the name of the column of values; None takes the only column of numbers.
        time_column: the name of a column of increasing dates or numbers, which the report shows.
        missing: ``"error"`` rejects empty cells, ``"interpolate"`` fills them.
        **options: see `SeriesDataModule`.
    """

    def __init__(
        self,
        path: str,
        column: str | None = None,
        time_column: str | None = None,
        missing: str = "error",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.column = column
        self.time_column = time_column
        self.missing = missing

    def read(self) -> Column:
        """Reads the column."""
        return read_column(self.path, self.column, self.time_column, self.missing)
