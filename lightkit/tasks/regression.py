"""A task of regression: one or several real values for each input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from lightkit.errors import ConfigError
from lightkit.nn import MSELoss
from lightkit.tasks.task import Task


class RegressionTask(Task):
    """Trains any model that maps inputs to values of shape ``(N, K)``, or ``(N)`` and ``(N, 1)`` for K = 1.

    The last entry of a batch is the targets, floating point ``(N, K)`` or ``(N)``, in their own units; the entries
    before the targets are the model's inputs. The model predicts standardised values, so that a learning rate fits
    targets of any unit. The task logs ``train/loss`` every step, ``val/loss`` and ``test/loss`` of standardised values,
    and every metric as ``val/NAME`` and ``test/NAME`` in the units of the targets, computed in float64.

    The state dict, and thus every checkpoint, has ``center`` and ``scale`` ``(K)``, the mean and the standard deviation
    of the training targets: a data module gives them by a method ``target_scale()``; without it they are 0 and 1.

    Args:
        model: the network.
        num_targets: the number of values, K.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(Adam, lr=0.001)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer: see
            `lightkit.tasks.Task`; None keeps the learning rate.
        loss: a module that maps standardised predictions and targets to a scalar. Default: `lightkit.nn.MSELoss`.
        metrics: metrics of torchmetrics by name, which the task updates with ``(predictions, targets)``; None for none.

    Raises:
        ConfigError: the model returns another number of values.
    """

    loss: nn.Module
    center: Tensor
    scale: Tensor

    def __init__(
        self,
        model: nn.Module,
        num_targets: int = 1,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        if num_targets < 1:
            raise ConfigError(f"num_targets must be at least 1, got {num_targets}")
        super().__init__(model, MSELoss() if loss is None else loss, optimizer, scheduler, metrics)
        for collection in (self.val_metrics, self.test_metrics):
            collection.set_dtype(torch.float64)
        self.num_targets = num_targets
        self.register_buffer("center", torch.zeros(num_targets, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(num_targets, dtype=torch.float64))

    def setup(self, stage: str) -> None:
        """Copies center and scale from the data module before a fit, if it has them; a checkpoint replaces them.

        Raises:
            ConfigError: the Trainer's precision is ``16-true`` or ``bf16-true``.
        """
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise ConfigError("targets cannot be represented in half precision: use the precision bf16-mixed")
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "target_scale"):
            center, scale = data.target_scale()
            self.center.copy_(center.reshape(self.num_targets))
            self.scale.copy_(scale.reshape(self.num_targets))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the predictions ``(N, K)`` for a batch's inputs, float64 in the units of the targets."""
        return self.center + self.scale * self._standardised_prediction(inputs)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Returns and logs the loss of a batch."""
        *inputs, target = batch
        prediction = self._standardised_prediction(inputs)
        loss = self.loss(prediction, self._standardised(target, prediction.dtype))
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(target))
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """Updates the test metrics; returns ``prediction`` and ``target``, each ``(N, K)``."""
        return {"prediction": self._evaluate(batch, "test", self.test_metrics), "target": self._columns(batch[-1])}

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Returns predictions ``(N, K)`` for a tensor of inputs, or for a batch, whose targets are ignored."""
        return self(*(batch[:-1] if isinstance(batch, (tuple, list)) else (batch,)))

    def _evaluate(self, batch: tuple[Tensor, ...], stage: str, metrics: MetricCollection) -> Tensor:
        *inputs, target = batch
        standardised = self._standardised_prediction(inputs)
        loss = self.loss(standardised, self._standardised(target, standardised.dtype))
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(target), sync_dist=True)
        prediction = self.center + self.scale * standardised
        metrics.update(prediction, self._columns(target).double())
        self.log_dict(metrics, prog_bar=True, batch_size=len(target))
        return prediction

    def _standardised_prediction(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the output of the model as ``(N, K)``."""
        prediction = self.model(*inputs)
        columns = self._columns(prediction)
        if columns.shape[1:] != (self.num_targets,):
            raise ConfigError(
                f"the model returns a tensor of shape {tuple(prediction.shape)} for {self.num_targets} targets a sample"
            )
        return columns

    def _standardised(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        # The difference is computed in float64; it is then small enough for the model's precision.
        return ((self._columns(target) - self.center) / self.scale).to(dtype)

    @staticmethod
    def _columns(values: Tensor) -> Tensor:
        return values.unsqueeze(1) if values.dim() == 1 else values
