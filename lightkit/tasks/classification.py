"""A task of classification: one class for each input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from lightkit.nn import CrossEntropyLoss
from lightkit.tasks.class_weights import set_class_weights
from lightkit.tasks.task import Task
from lightkit.tasks.training_accuracy import TrainingAccuracy


class ClassificationTask(Task):
    """Trains any model that maps inputs to logits of shape ``(N, C)``.

    The last entry of a batch is the labels ``(N)``, int64 in ``[0, C)``; the entries before the labels are the model's
    inputs: images, or sequences and their lengths. The task logs ``train/loss`` every step, and ``val/loss``,
    ``test/loss`` and every metric as ``val/NAME`` and ``test/NAME``. If a metric ``accuracy`` is the share of right
    samples, the task also logs ``train/accuracy`` before each validation and at the end of each epoch: the share of
    this process's samples since then whose class was right in their training step, with the dropout and the weights of
    that step.

    Args:
        model: the network.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(SGD, lr=0.1)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer, which Lightning calls once
            an epoch, or a `lightkit.tasks.Schedule`; None keeps the learning rate.
        loss: a module that maps ``(logits, labels)`` to a scalar. Default: `lightkit.nn.CrossEntropyLoss`. With
            ``CrossEntropyLoss(weight="balanced")`` a fit computes the class weights from the training labels: see
            `lightkit.tasks.class_weights`. The weights are in every checkpoint.
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
        accuracy = (metrics or {}).get("accuracy")
        self._training_accuracy = TrainingAccuracy() if accuracy is not None and _is_share(accuracy) else None

    def setup(self, stage: str) -> None:
        """Computes balanced class weights of the loss before a fit, and checks given ones.

        Raises:
            ConfigError: the number of given weights is not the number of classes.
            DataError: the weights are balanced, and a class has no training sample.
        """
        if stage == "fit" and isinstance(self.loss, CrossEntropyLoss):
            set_class_weights(self.loss, self.trainer)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the logits ``(N, C)`` of a batch's inputs."""
        return self.model(*inputs)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Returns and logs the loss of a batch."""
        *inputs, labels = batch
        logits = self.model(*inputs)
        if self._training_accuracy is not None:
            # Before the loss, which may write its gradient into the logits.
            self._training_accuracy.update(logits, labels, keeps=not getattr(self.loss, "inplace", False))
        loss = self.loss(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def on_train_start(self) -> None:
        """Begins to count the right samples of an epoch."""
        if self._training_accuracy is not None:
            self._training_accuracy.reset(self.device)

    def on_validation_start(self) -> None:
        """Logs the training accuracy since the previous validation, so that the checkpoint that follows has it."""
        self._log_training_accuracy()

    def on_train_epoch_end(self) -> None:
        """Logs the training accuracy of an epoch without a validation at its end."""
        self._log_training_accuracy()

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

    def _log_training_accuracy(self) -> None:
        share = self._training_accuracy.compute() if self._training_accuracy is not None else None
        if self._training_accuracy is not None and share is not None:
            self.log("train/accuracy", share, on_step=False, on_epoch=True, batch_size=1)
            self._training_accuracy.reset(self.device)

    def _evaluate(self, batch: tuple[Tensor, ...], stage: str, metrics: MetricCollection) -> Tensor:
        *inputs, labels = batch
        logits = self.model(*inputs)
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))
        return logits


def _is_share(metric: Metric) -> bool:
    """Returns True if ``metric`` is the share of right samples, and no mean over classes and no top-k accuracy."""
    is_plain = getattr(metric, "top_k", 1) in (None, 1) and getattr(metric, "ignore_index", None) is None
    return is_plain and getattr(metric, "average", None) == "micro"
