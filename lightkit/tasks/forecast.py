"""Forecasting: the next values of a series, with intervals, out of the last ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

    A batch is ``(history, target)`` in the units of the series, as `lightkit.data.SeriesDataModule` serves it. The
    model sees standardised numbers. Logs ``train/loss``, ``val/loss`` and ``test/loss`` of those, the metrics as
    ``val/NAME`` and ``test/NAME`` in the units of the series, and ``test/coverage``, the share of values that came to
    lie in their intervals.

    The intervals are those of split conformal prediction [1]_: for each step of the horizon, forecast plus and minus
    the ``level``-quantile of the absolute errors of the last validation; infinite where it was too short for that
    level. They hold at that level if the errors to come are like those of the validation, which a series that changes
    its ways does not promise: look at ``test/coverage``.

    What the model's numbers mean stands in the state dict, and so in every checkpoint: ``center`` and ``scale`` from
    the data module's training part, and ``half_width``, ``(horizon)``, of the intervals.

    Args:
        model: the network.
        horizon: values that it forecasts.
        optimizer: makes the optimizer of an iterable of parameters, such as ``partial(Adam, lr=0.001)``.
        scheduler: makes the learning-rate scheduler of the optimizer; stepped once an epoch.
        loss: of forecasts and targets, both standardised. Default: `lightkit.nn.MSELoss`.
        metrics: torchmetrics metrics by name, fed with ``(forecast, target)``.
        relative: the model sees how far each value of a history is from the last one, and forecasts how far the next
            ones will be. It then knows no levels: a series that climbs stays what it was trained on. A loss of 1 is
            that of forecasting no change. Without it, numbers are those of the series, standardised.
        level: of the intervals, between 0 and 1.

    References:
        .. [1] Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, Distribution-free predictive inference for regression,
           Journal of the American Statistical Association 113, 2018.
    """

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
        # float64, as the series: a level of a billion and changes of one leave nothing to float32.
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("half_width", torch.full((horizon,), math.inf, dtype=torch.float64))
        self._errors = CatMetric(nan_strategy="disable")

    def setup(self, stage: str) -> None:
        """Takes center and scale from the data module, if it has any; a checkpoint's come later and win."""
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise ConfigError("a series cannot be told in half precision: use trainer.precision=bf16-mixed")
        if stage == "fit" and hasattr(self.trainer.datamodule, "scale"):
            center, scale = self.trainer.datamodule.scale(self.relative)
            self.center.copy_(center)
            self.scale.copy_(scale)

    def forward(self, history: Tensor) -> Tensor:
        """Forecasts ``(N, horizon)`` of histories ``(N, T, 1)``, in the units of the series."""
        base = self._base(history)
        return base + self.scale * self._forecast(history, base)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        history, target = batch
        base = self._base(history)
        loss = self.loss(self._forecast(history, base), self._standardised(target, base))
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(target))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forgets the errors of the validation before."""
        self._errors.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Feeds the validation metrics, and keeps the errors for the intervals."""
        forecast = self._evaluate(batch, "val", self.val_metrics)
        self._errors.update((forecast - batch[1]).abs())

    def on_validation_epoch_end(self) -> None:
        """Makes the intervals that belong to the weights as they are, before a checkpoint is written."""
        if not self.trainer.sanity_checking:
            self.half_width.copy_(conformal_quantile(self._errors.compute(), self.level))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Feeds the test metrics; returns ``forecast``, ``target``, ``lower`` and ``upper``, each ``(N, horizon)``."""
        target = batch[1]
        forecast = self._evaluate(batch, "test", self.test_metrics)
        found = self._with_interval(forecast)
        inside = (found["lower"] <= target) & (target <= found["upper"])
        self.log("test/coverage", inside.double().mean(), batch_size=len(target), sync_dist=True)
        return {**found, "target": target}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``forecast``, ``lower`` and ``upper`` of histories, or of a batch whose targets are not looked at."""
        return self._with_interval(self(batch[0] if isinstance(batch, (tuple, list)) else batch))

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection) -> Tensor:
        history, target = batch
        base = self._base(history)
        standardised = self._forecast(history, base)
        loss = self.loss(standardised, self._standardised(target, base))
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(target), sync_dist=True)
        forecast = base + self.scale * standardised
        # Windows are views of the series, and torchmetrics takes views of those.
        metrics.update(forecast, target.contiguous())
        self.log_dict(metrics, prog_bar=True, batch_size=len(target))
        return forecast

    def _with_interval(self, forecast: Tensor) -> dict[str, Tensor]:
        return {"forecast": forecast, "lower": forecast - self.half_width, "upper": forecast + self.half_width}

    def _base(self, history: Tensor) -> Tensor:
        """What the model's zero stands for: ``(N, 1)``, or a scalar."""
        return history[:, -1] if self.relative else self.center

    def _forecast(self, history: Tensor, base: Tensor) -> Tensor:
        """The model's forecast, standardised."""
        forecast = self.model(self._standardised(history, base.unsqueeze(-1)))
        if forecast.shape != (len(history), self.horizon):
            raise ConfigError(
                f"the model's forecast of {len(history)} histories has the shape {tuple(forecast.shape)}, "
                f"but horizon is {self.horizon}"
            )
        return forecast

    def _standardised(self, values: Tensor, base: Tensor) -> Tensor:
        # The difference is taken in float64 and then small enough for the model's precision.
        return ((values - base) / self.scale).to(next(self.model.parameters()).dtype)


def conformal_quantile(errors: Tensor, level: float) -> Tensor:
    """The error that one more of its kind stays within, with probability ``level`` at least.

    Args:
        errors: absolute, ``(N, horizon)``.
        level: between 0 and 1.

    Returns:
        ``(horizon)``: for each step the ``ceil((N + 1) level)``-th smallest error; infinite if there are too few.
    """
    count = len(errors)
    # Rounded first: 0.7 * 10 is a little more than 7.
    rank = math.ceil(round((count + 1) * level, 9))
    if rank > count:
        return errors.new_full(errors.shape[1:], math.inf)
    return errors.kthvalue(rank, dim=0).values
