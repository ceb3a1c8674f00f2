"""A progress callback for terminals and for log files."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from lightkit._util.numbers import format_number
from lightkit._util.output_log import log_only
from lightkit._util.printable import printable


class Progress(RichProgressBar):
    """Shows a rich progress bar on a terminal, and prints one line per epoch if standard output is no terminal.

    Args:
        refresh_rate: the number of batches between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self._on_terminal = sys.stdout is not None and sys.stdout.isatty()
        if not self._on_terminal:
            self.disable()

    def enable(self) -> None:
        """Enables the bar on a terminal. Lightning calls this method in the process that shows progress."""
        if self._on_terminal:
            super().enable()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Returns the metrics that the bar shows, each as a text of four significant digits."""
        metrics = super().get_metrics(trainer, pl_module)
        return {printable(name): _format(value) for name, value in metrics.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the training loss and the validation metrics of the epoch in process 0.

        Where a bar shows them, the line goes to the log of the run alone.
        """
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        first = ("train/loss_epoch", "train/accuracy", "val/loss")
        wanted = (*first, *(name for name in metrics if name.startswith("val/") and name not in first))
        if not any(name in metrics for name in wanted):
            # A module of a user's has names of its own; `Throughput` logs rates.
            wanted = tuple(name for name in metrics if not name.endswith("_per_second"))
        shown = "  ".join(
            f"{printable(name.removesuffix('_epoch'))} {format_number(metrics[name].item())}"
            for name in wanted
            if name in metrics
        )
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        line = f"epoch {trainer.current_epoch + 1}/{total}  {shown}"
        if self._on_terminal:
            log_only(line)
        else:
            print(line, flush=True)


def _format(value: Any) -> Any:
    return format_number(value) if isinstance(value, float) else value
