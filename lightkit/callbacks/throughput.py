"""How many samples a second training gets through, and what a step's time goes into."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

_PARTS = ("data and loop", "forward", "backward", "optimizer")


class Throughput(Callback):
    """Logs ``train/samples_per_second`` at the end of every epoch.

    A data module may say what its samples are called in the plural (``unit``: ``train/images_per_second``), and how
    many there are in a batch (``count(batch)``); else it is the length of the first tensor.

    Counts the samples of all processes, and the time of training alone: from the start of an epoch to its last
    batch, without the validation in it. ``total`` has the figure of all epochs together, ``step`` what the time
    of a step goes into.
    """

    def __init__(self) -> None:
        self._parts = dict.fromkeys(_PARTS, 0.0)
        self._steps = 0
        self._mark = 0.0
        self._samples = 0
        self._seconds = 0.0
        self._epoch_samples = 0
        self._epoch_seconds = 0.0
        self._since = 0.0

    @property
    def total(self) -> float | None:
        """Samples a second over all epochs, or None before any has been trained."""
        return self._samples / self._seconds if self._seconds > 0 else None

    @property
    def step(self) -> dict[str, float] | None:
        """Milliseconds of a batch in the mean, by part: forward, backward, optimizer, and the rest of the loop.

        The rest is what comes between two batches: fetching and moving the next one, logging, progress, and
        Lightning. None before any batch has been trained, and where kernels run on after Python has moved on.
        """
        if self._steps == 0:
            return None
        return {name: seconds / self._steps * 1e3 for name, seconds in self._parts.items()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._epoch_samples, self._epoch_seconds = 0, 0.0
        self._resume_clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._end_of("data and loop")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """The loss is there."""
        self._end_of("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients are there."""
        self._end_of("backward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a batch."""
        self._end_of("optimizer")
        if pl_module.device.type == "cpu":
            self._steps += 1
        count = getattr(trainer.datamodule, "count", _batch_length)
        self._epoch_samples += count(batch)

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
        if trainer.world_size > 1:
            mine = torch.tensor(self._epoch_samples, device=pl_module.device)
            self._epoch_samples = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        self._samples += self._epoch_samples
        self._seconds += self._epoch_seconds
        if self._epoch_seconds > 0:
            pl_module.log(rate_name(trainer.datamodule), self._epoch_samples / self._epoch_seconds)

    def _resume_clock(self) -> None:
        self._since = self._mark = time.perf_counter()

    def _end_of(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now

    def _stop_clock(self, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # Kernels run on after Python has moved on.
            torch.cuda.synchronize(pl_module.device)
        self._epoch_seconds += time.perf_counter() - self._since


def rate_name(data: pl.LightningDataModule | None) -> str:
    """What the samples a second of a data module are logged as."""
    return f"train/{getattr(data, 'unit', 'samples')}_per_second"


def _batch_length(batch: Any) -> int:
    """The samples in a batch, by its first tensor; 0 where there is none."""
    while isinstance(batch, (tuple, list, dict)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if isinstance(batch, torch.Tensor) and batch.dim() > 0 else 0
