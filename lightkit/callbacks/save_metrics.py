"""A callback that saves the logged metrics in checkpoints, so that a kill after a checkpoint loses none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightkit._lightning.loops import results_of

# Keys of a checkpoint: the last value of each metric, and the metrics of the epoch that the checkpoint ends.
METRICS_KEY = "lightkit_figures"
EPOCH_METRICS_KEY = "lightkit_epoch_figures"


class SaveMetrics(Callback):
    """Adds the metrics to every checkpoint, and makes the loggers write their files before it is saved.

    Lightning saves the checkpoint at the end of an epoch before it logs the metrics of that epoch. Without this
    callback, a kill between the two would lose these metrics.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the metrics to ``checkpoint`` as dicts of plain numbers, which load with ``weights_only=True``.

        The key ``METRICS_KEY`` has the last value of each metric. The key ``EPOCH_METRICS_KEY`` has the metrics that
        Lightning will log for the epoch that has just ended; its dict is empty within an epoch.
        """
        for logger in trainer.loggers:
            logger.save()
        loop = trainer.fit_loop.epoch_loop
        results = results_of(loop)
        ends_epoch = loop.batch_progress.is_last_batch and results is not None
        epoch = results.metrics(on_step=False) if ends_epoch else {"log": {}, "callback": {}}
        checkpoint[METRICS_KEY] = _numbers({**trainer.callback_metrics, **epoch["callback"]})
        checkpoint[EPOCH_METRICS_KEY] = _numbers(epoch["log"])


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() if hasattr(value, "item") else value for name, value in sorted(metrics.items())}
