"""How many samples a second training gets through."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs ``train/images_per_second`` at the end of every epoch.

    Counts the samples of this process, and the time of training alone: from the start of an epoch to its last
    batch, without the validation in it. ``total`` has the figure of all epochs together.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._seconds = 0.0
        self._epoch_samples = 0
        self._epoch_seconds = 0.0
        self._since = 0.0

    @property
    def total(self) -> float | None:
        """Samples a second over all epochs, or None before any has been trained."""
        return self._samples / self._seconds if self._seconds > 0 else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._epoch_samples, self._epoch_seconds = 0, 0.0
        self._resume_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a batch."""
        self._epoch_samples += _batch_length(batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock for a validation within training."""
        if not trainer.sanity_checking:
            self._stop_clock(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts it again."""
        self._resume_clock()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the figure of the epoch."""
        self._stop_clock(pl_module)
        self._samples += self._epoch_samples
        self._seconds += self._epoch_seconds
        if self._epoch_seconds > 0:
            pl_module.log("train/images_per_second", self._epoch_samples / self._epoch_seconds)

    def _resume_clock(self) -> None:
        self._since = time.perf_counter()

    def _stop_clock(self, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # Kernels run on after Python has moved on.
            torch.cuda.synchronize(pl_module.device)
        self._epoch_seconds += time.perf_counter() - self._since


def _batch_length(batch: Any) -> int:
    while isinstance(batch, (tuple, list, dict)):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)
