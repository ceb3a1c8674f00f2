"""A progress callback for terminals and for log files."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Shows a rich progress bar on a terminal, and prints one line per epoch if standard output is no terminal.

    Args:
        refresh_rate: the number of batches between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self._on_terminal = sys.stdout.isatty()
        if not self._on_terminal:
            self.disable()

    def enable(self) -> None:
        """Enables the bar on a terminal. Lightning calls this method in the process that shows progress."""
        if self._on_terminal:
            super().enable()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the training loss and the validation metrics of the epoch in process 0, if there is no bar."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._on_terminal or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        wanted = ("train/loss_epoch", "val/loss", *(n for n in metrics if n.startswith("val/") and n != "val/loss"))
        shown = [f"{name.removesuffix('_epoch')} {metrics[name].item():.4f}" for name in wanted if name in metrics]
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        print(f"epoch {trainer.current_epoch + 1}/{total}  {'  '.join(shown)}", flush=True)
