"""Data modules of a time series in memory, cut into windows: some values, and the values that follow them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, after_setup, batches_for, check_positive
from lightkit.data.columns import Column, check_missing, describe, read_column
from lightkit.data.folds import Fold, Foldable
from lightkit.data.tables import TableSettings
from lightkit.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Samples of a series in the order of time and in the units of the series.

    Attributes:
        history: a float64 tensor ``(N, history, 1)``, the values from which a forecast is made.
        target: a float64 tensor ``(N, horizon)``, the values after the history.
        origins: an int64 tensor ``(N)``, the index in the series at which each target begins.
    """

    history: Tensor
    target: Tensor
    origins: Tensor

    def __len__(self) -> int:
        return len(self.origins)


def cut_windows(series: Column, history: int, horizon: int, begin: int, end: int) -> Windows:
    """Returns all windows whose targets lie in ``[begin, end)``; a history may begin before ``begin``.

    A window is left out if a value of its target, or the last value of its history, was not measured. A target then has
    no interpolated value, and a history has no value that was interpolated from its target: such a gap would contain
    the last value of the history.

    Args:
        series: the series.
        history: the number of values in a history.
        horizon: the number of values in a target.
        begin: the index of the first value that may belong to a target.
        end: the index after the last such value.
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


def join_windows(first: Windows, second: Windows) -> Windows:
    """Returns the windows of two parts of a series, those of ``first`` before those of ``second``."""
    pairs = ((getattr(first, name), getattr(second, name)) for name in ("history", "target", "origins"))
    return Windows(*map(torch.cat, pairs))


class SeriesDataModule(Foldable, pl.LightningDataModule):
    """A base class for data modules of windows of a series: batches ``(N, history, 1)`` and targets ``(N, horizon)``.

    The series is split in the order of time into training, validation and test. The target of a window lies in one
    part; its history may begin in the part before, as in a real forecast. Values are float64 in the units of the
    series. The task takes their scale from the training part only (`scale`) and saves it with the weights. Windows with
    certain gaps are left out: see `cut_windows`. A subclass defines `read`.

    `with_fold` divides the series before the test part into blocks of time and takes one of them for validation. No
    window of the training then contains a value of that block, neither in its target nor in its history.

    Args:
        history: the number of values from which a forecast is made.
        horizon: the number of values that are forecast.
        season: the number of values after which the series roughly repeats, at most ``history``; None for no season.
        validation_size: the size of the validation part: a number of values, or below 1 a share of the series.
        test_size: the size of the test part, which is the last: a number of values, or below 1 a share of the series.
        batch_size: the number of windows in a batch of training.
        eval_batch_size: the number of windows in a batch of validation and test; it changes the speed only.
        seed: the seed of the order of the training batches.

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
        check_positive(history=history, horizon=horizon, batch_size=batch_size, eval_batch_size=eval_batch_size)
        if season is not None:
            check_positive(season=season)
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
        """Reads the series and splits it; a second call does nothing."""
        if self.series is not None:
            return
        series = self.read()
        total = len(series)
        held_out = [size if size >= 1 else round(total * size) for size in (self.validation_size, self.test_size)]
        test = total - int(held_out[1])
        begin, end = (test - int(held_out[0]), test) if self.fold is None else self.fold.block(max(test, 0))
        # The values before and after the validation; without folds the test follows the validation.
        before, after = (0, begin), (end, test)
        cut = {
            "training": cut_windows(series, self.history, self.horizon, *before),
            "validation": cut_windows(series, self.history, self.horizon, begin, end),
            "test": cut_windows(series, self.history, self.horizon, test, total),
        }
        if end < test:
            # The first history after the validation begins after it.
            later = cut_windows(series, self.history, self.horizon, end + self.history, test)
            cut["training"] = join_windows(cut["training"], later) if len(cut["training"]) else later
        sizes = {"training": begin + test - end, "validation": end - begin, "test": total - test}
        for name, windows in cut.items():
            if len(windows) == 0:
                fold = "" if self.fold is None else f" of fold {self.fold.index} of {self.fold.count}"
                raise DataError(
                    f"{type(self).__name__}: of {total} values the {name} part{fold} has {max(sizes[name], 0)}, too "
                    f"few for one window without a gap: history={self.history} and horizon={self.horizon} come to "
                    f"{self.history + self.horizon}, of which the horizon must lie in the part"
                )
        self.train, self.validation, self.test = cut["training"], cut["validation"], cut["test"]
        parts = [slice(*before), slice(*after)]
        self._training_values = torch.cat([series.values[part][series.measured[part]] for part in parts])
        self.series = series

    def _begin_fold(self, fold: Fold) -> None:
        self.series = self.train = self.validation = self.test = None

    def scale(self, relative: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the center and the scale of the training part, two float64 tensors without dimensions.

        Args:
            relative: False returns the mean and the standard deviation of the measured values. True returns zero and
                the root mean square of the differences between each target and the last value of its history.

        Raises:
            DataError: all measured values of the training part are equal, they span more than float64 holds, or with
                ``relative`` no target differs from the last value of its history.
        """
        name = after_setup(self.series).name
        values = self._training_values
        lowest = values.min()
        span = values.max() - lowest
        if span == 0:
            raise DataError(f"{type(self).__name__}: column {name} does not vary in the training part")
        if not span.isfinite():
            raise DataError(
                f"{type(self).__name__}: column {name} is from {lowest:g} to {values.max():g} in the training part, "
                "which is more than float64 can subtract"
            )
        # Shares of the span: squares of the values themselves leave the range of float64, and lose small changes of
        # large values.
        shares = (values - lowest) / span
        center, scale = lowest + span * shares.mean(), shares.std(correction=0)
        if relative:
            train = after_setup(self.train)
            last = train.history[:, -1, 0]
            # One step of the horizon at a time: all differences at once take many times the memory of the series.
            squares = [((step - last) / span).square().mean() for step in train.target.unbind(dim=1)]
            center, scale = torch.zeros_like(center), torch.stack(squares).mean().sqrt()
            if scale == 0:
                raise DataError(
                    f"{type(self).__name__}: no target of column {name} differs from the last value of its history in "
                    "the training part, so that the differences have no scale: set task.relative=false"
                )
        # A scale of zero would divide by zero.
        return center, (span * scale).clamp(min=torch.finfo(torch.float64).tiny)

    def baselines(self) -> dict[str, float]:
        """Returns MAE and RMSE of naive forecasts on the test part, in the units of the series.

        The keys are ``naive_mae`` and ``naive_rmse``, and with a season also ``seasonal_naive_mae`` and
        ``seasonal_naive_rmse``: see `naive` and `seasonal_naive`.
        """
        test = after_setup(self.test)
        errors = {"naive": self.naive(test) - test.target}
        if self.season is not None:
            errors["seasonal_naive"] = self.seasonal_naive(test) - test.target
        found = {f"{name}_mae": error.abs().mean().item() for name, error in errors.items()}
        return found | {f"{name}_rmse": error.square().mean().sqrt().item() for name, error in errors.items()}

    def naive(self, windows: Windows) -> Tensor:
        """Returns the last value of each history, repeated over the horizon: float64 ``(N, horizon)``."""
        return windows.history[:, -1].expand(-1, self.horizon)

    def seasonal_naive(self, windows: Windows) -> Tensor:
        """Returns the last ``season`` values of each history, repeated over the horizon: float64 ``(N, horizon)``.

        Raises:
            ValueError: there is no ``season``.
        """
        season = self.season
        if season is None:
            raise ValueError("the series has no season")
        steps = torch.arange(self.horizon) % season
        return windows.history[:, self.history - season + steps, 0]

    def _batches(self, windows: Windows, batch_size: int, shuffle: bool = False) -> TensorBatches:
        tensors = (windows.history, windows.target)
        return batches_for(self.trainer, tensors, batch_size, shuffle=shuffle, seed=self.seed)

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
    """A data module of a column of a table: a CSV file, or an .xlsx workbook; see `lightkit.data.columns.read_column`.

    `setup` prints one line that says how the file was read, unless it is plain CSV: UTF-8, commas, decimal points.

    Args:
        path: the file; its first line names the columns, its rows are in the order of time or in the reverse order.
        column: the name of the column of values; None takes the only column of numbers.
        time_column: the name of a column of dates or numbers, which the report shows; None takes the only column of
            dates, if there is one.
        missing: what becomes of cells without a value, and of missing times: ``"error"`` rejects them,
            ``"interpolate"`` interpolates them linearly, ``"drop"`` takes the other rows as evenly spaced.
        separator: the separator of the cells, such as ``"semicolon"``: this argument and those below are as in
            `lightkit.data.tables.TableSettings`, and None finds each of them.
        decimal: the decimal mark, ``"point"`` or ``"comma"``.
        encoding: the name of the encoding, such as ``"cp1252"``.
        header: True if the first line has the names of the columns, False if it has values.
        skip_lines: the number of lines above the table.
        sheet: the name of the sheet of a workbook.
        day_first: True if ``01/02/2020`` is the first of February, False if it is the second of January.
        **options: the arguments of `SeriesDataModule`.

    Raises:
        DataError: an argument is out of its range, or `setup` cannot read the file.
    """

    def __init__(
        self,
        path: str,
        column: str | int | None = None,
        time_column: str | int | None = None,
        missing: str = "error",
        separator: str | None = None,
        decimal: str | None = None,
        encoding: str | None = None,
        header: bool | None = None,
        skip_lines: int | None = None,
        sheet: str | int | None = None,
        day_first: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_missing(missing)
        self.path = path
        self.column = column
        self.time_column = time_column
        self.missing = missing
        # On a command line the sheet 2020 is a number.
        sheet = None if sheet is None else str(sheet)
        self.settings = TableSettings(separator, decimal, encoding, header, skip_lines, sheet, day_first)

    def read(self) -> Column:
        """Reads the column, and prints how in the first process of a job."""
        series = read_column(self.path, self.column, self.time_column, self.missing, self.settings)
        if series.notes and (self.trainer is None or self.trainer.is_global_zero):
            print(describe(self.path, series), flush=True)
        return series
