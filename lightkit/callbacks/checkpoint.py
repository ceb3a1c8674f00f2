"""Checkpoints of which ``last.ckpt`` is the latest one, to go on from."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, with a ``last.ckpt`` each time that it looks at its monitor.

    Lightning 2.6 writes it only when it also wrote another checkpoint, the best so far: a job that goes on from
    there loses all that came after its best epoch.

    Args:
        *arguments: of Lightning's callback.
        **options: likewise.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after an epoch of training, where Lightning does it here."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after a validation, where Lightning does it here."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        # With every_n_train_steps it is 0, and those are the ones that count. To skip means: saved, or not to be.
        by_epochs = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if by_epochs and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
