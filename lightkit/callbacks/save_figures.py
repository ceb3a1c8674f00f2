"""Lets a checkpoint stand for all that came before it, so that a kill right after it loses nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightkit._lightning.loops import results_of

# Where a checkpoint keeps the figures that were logged last under each name, and those of the epoch that it ends.
FIGURES_KEY = "lightkit_figures"
EPOCH_KEY = "lightkit_epoch_figures"


class SaveFigures(Callback):
    """Puts figures into every checkpoint, and has the loggers write what they have.

    Lightning logs the figures of an epoch of training after it has saved the checkpoint that ends the epoch.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds dicts of plain numbers, which load with ``weights_only=True``."""
        for logger in trainer.loggers:
            logger.save()
        loop = trainer.fit_loop.epoch_loop
        results = results_of(loop)
        is_end = loop.batch_progress.is_last_batch and results is not None
        epoch = results.metrics(on_step=False) if is_end else {"log": {}, "callback": {}}
        checkpoint[FIGURES_KEY] = _numbers({**trainer.callback_metrics, **epoch["callback"]})
        checkpoint[EPOCH_KEY] = _numbers(epoch["log"])


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() if hasattr(value, "item") else value for name, value in sorted(metrics.items())}
