"""Lets a checkpoint stand for all that came before it, so that a kill right after it loses nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

# Where a checkpoint keeps the figures.
FIGURES_KEY = "lightkit_figures"


class SaveFigures(Callback):
    """Puts what was logged last under each name into every checkpoint, and has the loggers write what they have."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds a dict of plain numbers, which loads with ``weights_only=True``."""
        for logger in trainer.loggers:
            logger.save()
        checkpoint[FIGURES_KEY] = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
