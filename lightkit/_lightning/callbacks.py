"""Conditions under which Lightning's own callbacks act in a training step; they use private attributes."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer


def checkpoint_is_due(trainer: pl.Trainer, callback: ModelCheckpoint) -> bool:
    """Returns True if ``callback`` may write a checkpoint after the present training step."""
    if callback._train_time_interval is not None:
        return True
    every = callback._every_n_train_steps
    return every >= 1 and trainer.global_step % every == 0


def timer_is_due(trainer: pl.Trainer, callback: Timer) -> bool:
    """Returns True if ``callback`` has a duration, after which it stops the training."""
    return callback._duration is not None


def logging_is_due(trainer: pl.Trainer, callback: LearningRateMonitor) -> bool:
    """Returns True if the trainer passes the metrics of the present step to the loggers."""
    return trainer._logger_connector.should_update_logs
