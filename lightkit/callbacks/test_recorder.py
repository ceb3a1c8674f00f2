"""Keeps every prediction of the test set for whoever looks at single ones."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class TestRecorder(Callback):
    """Collects logits ``(N, C)`` and labels ``(N)`` of a test, on the CPU, in the order of the data.

    For tasks whose ``test_step`` returns ``{"logits": ...}`` for batches ``(inputs, labels)``. With several
    processes each sees a part of the data, which is nobody's test set: then there is no result.
    """

    # Not a test class, whatever its name looks like to pytest.
    __test__ = False

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier test."""
        self._logits, self._labels = [], []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a batch."""
        if trainer.world_size > 1:
            return
        self._logits.append(outputs["logits"].detach().float().cpu())
        self._labels.append(batch[1].cpu())

    def result(self) -> tuple[Tensor, Tensor] | None:
        """Logits and labels of the whole test, or None if there was none."""
        return (torch.cat(self._logits), torch.cat(self._labels)) if self._labels else None
