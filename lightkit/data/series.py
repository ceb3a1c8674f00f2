"""Forecasting a series that fits in memory: windows of its past and of what came next."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, near_training, shard_kwargs
from lightkit.data.columns import Column, read_column
from lightkit.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Samples of a series, in the order of time and in its own units.

    Attributes:
        history: float64 ``(N, history, 1)``.
        target: float64 ``(N, horizon)``, the values after the history.
        origins: int64 ``(N)``, where in the series each target begins.
    """

    history: Tensor
    target: Tensor
    origins: Tensor

    def __len__(self) -> int:
        return len(self.origins)


def cut_windows(series: Column, history: int, horizon: int, begin: int, end: int) -> Windows:
    """All windows whose targets lie in ``[begin, end)``; their histories may begin before that.

    A window is left out if a value of its target, or the last of its history, is not a measured one. Nobody is then
    tested on an invented value, and no history knows the future: a straight line across a gap is drawn towards a
    value that comes after it, so that a history may end in a gap only where the target begins in it.
    """
    begin = max(begin, history)
    first = torch.arange(begin, max(begin, end - horizon + 1))
    if len(first) == 0:
        return Windows(torch.empty(0, history, 1), torch.empty(0, horizon), first)
    # Views: a window is copied when it gets into a batch.
    part = series.values[begin - history : end]
    windows = part.unfold(0, history + horizon, 1)
    known = series.measured[begin - 1 : end].unfold(0, 1 + horizon, 1).all(dim=1)
    if not known.all():
        windows, first = windows[known], first[known]
    return Windows(windows[:, :history].unsqueeze(2), windows[:, history:], first)


class SeriesDataModule(pl.LightningDataModule):
    """Serves windows of one series: ``history`` values ``(N, history, 1)`` and the next ``horizon`` ``(N, horizon)``.

    The series is split in the order of time into training, validation and test. The history of a window may reach
    back into the part before, as it would when forecasting; its target is in its own part as a whole. Values are
    float64 in the units of the series: how to scale them is learned from the training part alone (`scale`), by the
    task, which keeps it with the weights. Where the series has gaps see `cut_windows`. A subclass defines `read`.

    Args:
        history: values that a forecast is made of.
        horizon: values that are forecast.
        season: values after which the series more or less repeats; None where it does not.
        validation_size: of the part before the test: a number of values, or below 1 a share of the series.
        test_size: of the last part, likewise.
        batch_size: of training.
        eval_batch_size: of validation and test, where it changes nothing but speed.
        seed: of the order of training.
    """

    # What the samples are called in the plural.
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
        """The whole series."""

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
        """Center and scale of the training part, float64 scalars.

        Args:
            relative: zero, and the root mean square of how far the targets are from the last value of their history.
                Otherwise mean and standard deviation of the measured values.

        Raises:
            DataError: nothing changes in the training part.
        """
        values = self._training_values
        center, scale = values.mean(), values.std(correction=0)
        if relative:
            last = self.train.history[:, -1, 0]
            # Step by step: all the differences at once would take many times the memory of the series.
            squares = torch.stack([(step - last).square().mean() for step in self.train.target.unbind(dim=1)])
            center, scale = torch.zeros_like(center), squares.mean().sqrt()
        # Not zero: the mean of equal numbers may be rounded.
        if scale <= 1e-12 * values.abs().max():
            raise DataError(f"{type(self).__name__}: column {self.series.name} does not vary in the training part")
        return center, scale

    def baselines(self) -> dict[str, float]:
        """MAE and RMSE of two rules on the targets of the test, in the units of the series.

        ``naive`` says that the last value stays; ``seasonal_naive``, where there is a season, that the last season
        comes again.
        """
        errors = {"naive": self.naive(self.test) - self.test.target}
        if self.season is not None:
            errors["seasonal_naive"] = self.seasonal_naive(self.test) - self.test.target
        found = {f"{name}_mae": error.abs().mean().item() for name, error in errors.items()}
        return found | {f"{name}_rmse": error.square().mean().sqrt().item() for name, error in errors.items()}

    def naive(self, windows: Windows) -> Tensor:
        """The last value of each history, for the whole horizon: ``(N, horizon)``."""
        return windows.history[:, -1].expand(-1, self.horizon)

    def seasonal_naive(self, windows: Windows) -> Tensor:
        """The last season of each history, again and again: ``(N, horizon)``."""
        steps = torch.arange(self.horizon) % self.season
        return windows.history[:, self.history - self.season + steps, 0]

    def _batches(self, windows: Windows, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return TensorBatches(
            near_training(self.trainer, (windows.history, windows.target)),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )

    def train_dataloader(self) -> TensorBatches:
        """Shuffled batches of the training part."""
        return self._batches(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches:
        """Batches of the validation part, in order."""
        return self._batches(self.validation, self.eval_batch_size)

    def test_dataloader(self) -> TensorBatches:
        """Batches of the test part, in order."""
        return self._batches(self.test, self.eval_batch_size)


class Series(SeriesDataModule):
    """A column of a CSV file: see `lightkit.data.columns.read_column`.

    Args:
        path: the file; its first line names the columns, its rows are in the order of time.
        column: the values; None takes the only column of numbers.
        time_column: dates or numbers that increase, which are checked and shown in the report.
        missing: ``"error"`` refuses empty cells, ``"interpolate"`` fills them.
        **options: see `SeriesDataModule`.
    """

    def __init__(
        self,
        path: str,
        column: str | None = None,
        time_column: str | None = None,
        missing: str = "error",
        **options: float | None,
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.column = column
        self.time_column = time_column
        self.missing = missing

    def read(self) -> Column:
        """The column."""
        return read_column(self.path, self.column, self.time_column, self.missing)
