"""What all tasks share: the parts of a job bound together, optimizer, scheduler, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection


class Task(pl.LightningModule):
    """Binds a model, a loss, an optimizer and metrics.

    A task defines the steps. By convention it logs ``train/loss`` every step, and ``val/loss``, ``test/loss`` and
    every metric as ``val/NAME`` and ``test/NAME``; its ``test_step`` returns a dict of tensors with one entry a
    sample, for whoever looks at single predictions (`lightkit.callbacks.TestRecorder`).

    Args:
        model: the network.
        loss: the loss module, or None for a task that has it from a function.
        optimizer: makes the optimizer of an iterable of parameters, such as ``partial(SGD, lr=0.1)``.
        scheduler: makes the learning-rate scheduler of the optimizer; stepped once an epoch.
        metrics: torchmetrics metrics by name.
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the scheduler where there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        entry: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            entry["monitor"] = "val/loss"
        return {"optimizer": optimizer, "lr_scheduler": entry}
