"""The base of tasks: a model, a loss, an optimizer, a scheduler and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from lightkit.tasks.schedule import make_schedule


class Task(pl.LightningModule):
    """A LightningModule of a model, a loss, an optimizer and metrics.

    A subclass defines the steps. By convention a subclass logs ``train/loss`` every step, and ``val/loss``,
    ``test/loss`` and every metric as ``val/NAME`` and ``test/NAME``. Its ``test_step`` returns a dict of tensors with
    one entry for each sample, which `lightkit.callbacks.TestRecorder` collects.

    Args:
        model: the network.
        loss: the loss module, or None if the task computes the loss by a function.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(SGD, lr=0.1)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer, which Lightning calls once
            an epoch, or a `lightkit.tasks.Schedule`, which sets the interval and the metric; None keeps the learning
            rate. The function may leave the length of the schedule to the trainer, as ``partial(CosineAnnealingLR,
            T_max=None)`` does: see `lightkit.tasks.schedule.make_schedule`.
        metrics: metrics of torchmetrics by name; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        collection = MetricCollection(dict(metrics or {}))
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    def use_optimizer(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        """Replaces the optimizer and the scheduler of the next training; the arguments are those of the constructor."""
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimizer, and the scheduler if there is one: see `lightkit.tasks.schedule.make_schedule`."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        schedule = make_schedule(self._make_scheduler, optimizer, lambda: self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
