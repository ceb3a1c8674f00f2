"""Classification: one class out of several for each input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection

from lightkit.nn import CrossEntropyLoss


class ClassificationTask(pl.LightningModule):
    """Trains any model that maps inputs to logits of shape ``(N, C)``.

    A batch is a pair ``(inputs, labels)`` with labels ``(N)`` in ``[0, C)``. Logs ``train/loss`` every step,
    and ``val/loss``, ``test/loss`` and every metric as ``val/NAME`` and ``test/NAME``.

    Args:
        model: the network.
        optimizer: makes the optimizer of an iterable of parameters, such as ``partial(SGD, lr=0.1)``.
        scheduler: makes the learning-rate scheduler of the optimizer; stepped once an epoch.
        loss: of ``(logits, labels)``. Default: `lightkit.nn.CrossEntropyLoss`.
        metrics: torchmetrics metrics by name, fed with ``(logits, labels)``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = CrossEntropyLoss() if loss is None else loss
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        collection = MetricCollection(dict(metrics or {}))
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, labels = batch
        loss = self.loss(self.model(inputs), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Feeds the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Feeds the test metrics; returns the logits for callbacks that look at single predictions."""
        return {"logits": self._evaluate(batch, "test", self.test_metrics)}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, C)`` of inputs, given alone or as the first of a batch."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.model(inputs).float().softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection) -> Tensor:
        inputs, labels = batch
        logits = self.model(inputs)
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))
        return logits

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
