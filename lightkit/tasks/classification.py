"""A task of classification: one class for each input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from lightkit.nn import CrossEntropyLoss
from lightkit.tasks.task import Task


class ClassificationTask(Task):
    """Trains any model that maps inputs to logits of shape ``(N, C)``.

    The last entry of a batch is the labels ``(N)``, int64 in ``[0, C)``; the entries before the labels are the model's
    inputs: images, or sequences and their lengths. The task logs ``train/loss`` every step, and ``val/loss``,
    ``test/loss`` and every metric as ``val/NAME`` and ``test/NAME``.

    Args:
        model: the network.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(SGD, lr=0.1)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer, which Lightning steps once
            an epoch; None keeps the learning rate.
        loss: a module that maps ``(logits, labels)`` to a scalar. Default: `lightkit.nn.CrossEntropyLoss`.
        metrics: metrics of torchmetrics by name, which the task updates with ``(logits, labels)``; None for none.
    """

    loss: nn.Module

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(model, CrossEntropyLoss() if loss is None else loss, optimizer, scheduler, metrics)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the logits ``(N, C)`` of a batch's inputs."""
        return self.model(*inputs)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Returns and logs the loss of a batch."""
        *inputs, labels = batch
        loss = self.loss(self.model(*inputs), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """Updates the test metrics; returns ``logits`` ``(N, C)`` and ``labels`` ``(N)``."""
        return {"logits": self._evaluate(batch, "test", self.test_metrics), "labels": batch[-1]}

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Returns class probabilities ``(N, C)`` for a tensor of inputs, or for a batch, whose labels are ignored."""
        inputs = batch[:-1] if isinstance(batch, (tuple, list)) else (batch,)
        return self.model(*inputs).float().softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, ...], stage: str, metrics: MetricCollection) -> Tensor:
        *inputs, labels = batch
        logits = self.model(*inputs)
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))
        return logits
