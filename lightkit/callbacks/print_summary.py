"""A callback that prints the layers of the model once."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightkit.summary import summarize


class PrintSummary(Callback):
    """Prints the parameters, output sizes and multiply-adds of the layers before the first step of a training.

    The sizes are those for one sample of the first batch. The model is the attribute ``model`` of the LightningModule
    if it has one, else the LightningModule itself. The callback changes nothing: see `lightkit.summary.summarize`.

    Args:
        max_depth: the number of levels of layers below the model.

    Raises:
        ValueError: ``max_depth`` is negative.
    """

    def __init__(self, max_depth: int = 2) -> None:
        if max_depth < 0:
            raise ValueError(f"max_depth must be at least 0, got {max_depth}")
        self.max_depth = max_depth
        self._is_due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the first batch print the table, in process 0 alone."""
        self._is_due = trainer.is_global_zero

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prints the table at the first batch of the training."""
        if not self._is_due:
            return
        self._is_due = False
        model = getattr(pl_module, "model", None)
        model = model if isinstance(model, nn.Module) else pl_module
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        inputs = (first,) if isinstance(first, Tensor) and first.ndim > 0 else ()
        print(summarize(model, *inputs, max_depth=self.max_depth), flush=True)
