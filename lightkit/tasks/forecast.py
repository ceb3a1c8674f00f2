"""A task of forecasting: the next values of a series, with prediction intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import CatMetric, Metric, MetricCollection

from lightkit.errors import ConfigError
from lightkit.nn import MSELoss
from lightkit.tasks.task import Task


class ForecastTask(Task):
    """Trains any model that maps histories of shape ``(N, T, 1)`` to forecasts of shape ``(N, horizon)``.

    A batch is ``(history, target)`` in the units of the series, as from `lightkit.data.SeriesDataModule`; the model
    reads and returns standardised values. The task logs ``train/loss``, ``val/loss`` and ``test/loss`` of standardised
    values, the metrics as ``val/NAME`` and ``test/NAME`` in the units of the series, and ``test/coverage``, the share
    of targets within their intervals. The metrics compute in float64.

    The intervals are those of split conformal prediction [1]_: for each step of the horizon, the forecast plus and
    minus the ``level``-quantile of the absolute errors of the last validation. The intervals are infinite if the
    validation is too short for the level. The level holds for errors like those of the validation; a series may change,
    so compare ``test/coverage``.

    The state dict, and thus every checkpoint, has ``center`` and ``scale`` of the data module's training part, and
    ``half_width`` ``(horizon)`` of the intervals.

    Args:
        model: the network.
        horizon: the number of values that the model forecasts.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(Adam, lr=0.001)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer, which Lightning calls once
            an epoch, or a `lightkit.tasks.Schedule`; None keeps the learning rate.
        loss: a module that maps standardised forecasts and targets to a scalar. Default: `lightkit.nn.MSELoss`.
        metrics: metrics of torchmetrics by name, which the task updates with ``(forecast, target)``; None for none.
        relative: True makes the model read and forecast differences to the last value of the history. The model then
            does not depend on the level of the series, which may rise beyond the training part, and a loss of 1 is the
            loss of the naive forecast. False makes the model read and forecast the standardised values.
        level: the share of targets that the intervals are to contain, between 0 and 1.

    Raises:
        ConfigError: ``level`` is out of its range, the model returns another shape, or the precision is too low.

    References:
        .. [1] Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, Distribution-free predictive inference for regression,
           Journal of the American Statistical Association 113, 2018.
    """

    loss: nn.Module
    center: Tensor
    scale: Tensor
    half_width: Tensor

    def __init__(
        self,
        model: nn.Module,
        horizon: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        relative: bool = True,
        level: float = 0.9,
    ) -> None:
        if not 0 < level < 1:
            raise ConfigError(f"level must be between 0 and 1, got {level}")
        super().__init__(model, MSELoss() if loss is None else loss, optimizer, scheduler, metrics)
        self.horizon = horizon
        self.relative = relative
        self.level = level
        # float64, as the series: float32 cannot represent changes of one at a level of a billion.
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("half_width", torch.full((horizon,), math.inf, dtype=torch.float64))
        self._errors = CatMetric(nan_strategy="disable")
        # The intervals of the last validation in this training; None before it.
        self._validated: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Copies center and scale from the data module before a fit, if it has them; a checkpoint replaces them later.

        Before a validation, a test or a prediction the values stay as they are.

        Raises:
            ConfigError: the Trainer's precision is ``16-true`` or ``bf16-true``.
        """
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise ConfigError("a series cannot be represented in half precision: use the precision bf16-mixed")
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "scale"):
            center, scale = data.scale(self.relative)
            self.center.copy_(center)
            self.scale.copy_(scale)

    def forward(self, history: Tensor) -> Tensor:
        """Returns float64 forecasts ``(N, horizon)`` for histories ``(N, T, 1)``, in the units of the series."""
        base = self._base(history)
        return self._in_units(self._forecast(history, base), base)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns and logs the loss of a batch."""
        history, target = batch
        base = self._base(history)
        loss = self.loss(self._forecast(history, base), self._standardised(target, base))
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(target))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Drops the errors of the previous validation, and makes the metrics compute in float64."""
        self._errors.reset()
        _to_float64(self._errors, self.val_metrics)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Updates the validation metrics, and keeps the errors for the intervals."""
        forecast = self._evaluate(batch, "val", self.val_metrics)
        self._errors.update((forecast - batch[1]).abs())

    def on_validation_epoch_end(self) -> None:
        """Computes the intervals of the present weights, before a checkpoint is written."""
        if not self.trainer.sanity_checking:
            self._validated = conformal_quantile(self._errors.compute(), self.level)
            self.half_width.copy_(self._validated)

    def on_train_end(self) -> None:
        """Restores the intervals of the last validation, if a callback has replaced them with averages of buffers."""
        if self._validated is not None:
            self.half_width.copy_(self._validated)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the intervals of the last validation with the weights that it validated.

        A callback may save averages of weights and buffers. The average of intervals belongs to no validation.
        """
        if self._validated is not None and "half_width" in checkpoint["state_dict"]:
            checkpoint["state_dict"]["half_width"] = self._validated.clone()

    def on_test_epoch_start(self) -> None:
        """Makes the metrics compute in float64."""
        _to_float64(self.test_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Updates the test metrics; returns ``forecast``, ``target``, ``lower``, ``upper``, each ``(N, horizon)``."""
        target = batch[1]
        forecast = self._evaluate(batch, "test", self.test_metrics)
        found = self._with_interval(forecast)
        inside = (found["lower"] <= target) & (target <= found["upper"])
        self.log("test/coverage", inside.double().mean(), batch_size=len(target), sync_dist=True)
        return {**found, "target": target}

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns ``forecast``, ``lower`` and ``upper``, each ``(N, horizon)``, for histories ``(N, T, 1)``.

        ``batch`` is the tensor of histories, or a batch, whose targets are ignored.
        """
        return self._with_interval(self(batch[0] if isinstance(batch, (tuple, list)) else batch))

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection) -> Tensor:
        history, target = batch
        base = self._base(history)
        standardised = self._forecast(history, base)
        loss = self.loss(standardised, self._standardised(target, base))
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(target), sync_dist=True)
        forecast = self._in_units(standardised, base)
        # Windows are strided views of the series, and torchmetrics calls view() on its inputs.
        metrics.update(forecast, target.contiguous())
        self.log_dict(metrics, prog_bar=True, batch_size=len(target))
        return forecast

    def _with_interval(self, forecast: Tensor) -> dict[str, Tensor]:
        return {"forecast": forecast, "lower": forecast - self.half_width, "upper": forecast + self.half_width}

    def _base(self, history: Tensor) -> Tensor:
        """Returns the value that standardises to zero: ``(N, 1)`` if ``relative`` is True, else a scalar."""
        return history[:, -1] if self.relative else self.center

    def _forecast(self, history: Tensor, base: Tensor) -> Tensor:
        """Returns the model's standardised forecast ``(N, horizon)``: ``(value - base) / scale`` of each value.

        Args:
            history: histories ``(N, T, 1)`` in the units of the series.
            base: the result of `_base` for ``history``.

        Raises:
            ConfigError: the model returns another shape.
        """
        forecast = self.model(self._standardised(history, base.unsqueeze(-1)))
        if forecast.shape != (len(history), self.horizon):
            raise ConfigError(
                f"the model's forecast of {len(history)} histories has the shape {tuple(forecast.shape)}, "
                f"but horizon is {self.horizon}"
            )
        return forecast

    def _in_units(self, standardised: Tensor, base: Tensor) -> Tensor:
        # A scalar of float64 would leave the product in the model's precision, which cannot represent the series.
        return base + self.scale * standardised.to(self.scale.dtype)

    def _standardised(self, values: Tensor, base: Tensor) -> Tensor:
        # The difference is computed in float64; it is then small enough for the model's precision.
        # A model without parameters, such as an export, computes in float32.
        parameter = next(self.model.parameters(), None)
        return ((values - base) / self.scale).to(torch.float32 if parameter is None else parameter.dtype)


def _to_float64(*metrics: Metric | MetricCollection) -> None:
    """Sets the dtype of metrics, as errors in the units of a series leave the range of float32, the metrics' own dtype.

    A metric that moves to another device forgets the dtype of its inputs, so that each epoch sets it again.
    """
    for metric in metrics:
        metric.set_dtype(torch.float64)


def conformal_quantile(errors: Tensor, level: float) -> Tensor:
    """Returns the bound that a new error of the same distribution stays below with probability ``level`` at least.

    Args:
        errors: absolute errors ``(N, horizon)``.
        level: the probability, between 0 and 1.

    Returns:
        ``(horizon)``: the ``ceil((N + 1) level)``-th smallest error of each step; infinite if N is less than this rank.
    """
    count = len(errors)
    # Rounding: 0.7 * 10 is slightly more than 7 in floating point.
    rank = math.ceil(round((count + 1) * level, 9))
    if rank > count:
        return errors.new_full(errors.shape[1:], math.inf)
    return errors.kthvalue(rank, dim=0).values
