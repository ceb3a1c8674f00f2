"""When Lightning's own callbacks have something to do in a step, which they keep in private attributes."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer


def checkpoint_is_due(trainer: pl.Trainer, callback: ModelCheckpoint) -> bool:
    """Returns True if a step may be followed by a checkpoint."""
    if callback._train_time_interval is not None:
        return True
    every = callback._every_n_train_steps
    return every >= 1 and trainer.global_step % every == 0


def timer_is_due(trainer: pl.Trainer, callback: Timer) -> bool:
    """Returns True if a timer may stop the training."""
    return callback._duration is not None


def logging_is_due(trainer: pl.Trainer, callback: LearningRateMonitor) -> bool:
    """Returns True if the metrics of a step go to the loggers."""
    return trainer._logger_connector.should_update_logs
