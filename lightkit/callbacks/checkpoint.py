"""Checkpoints of which ``last.ckpt`` is the latest one, to go on from."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, with a ``last.ckpt`` after each validation.

    Lightning 2.6 writes it only after those that also gave another checkpoint, the best so far: a job that goes on from
    there loses all that came after its best epoch.

    Args:
        *arguments: of Lightning's callback.
        **options: likewise.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what is among the best, and the last one in any case."""
        super().on_validation_end(trainer, pl_module)
        # With every_n_train_steps, those are the ones that count.
        by_epochs = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        # To skip means: it has been saved, or is not to be.
        if by_epochs and not (
            self._should_skip_saving_checkpoint(trainer) or self._should_save_on_train_epoch_end(trainer)
        ):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
