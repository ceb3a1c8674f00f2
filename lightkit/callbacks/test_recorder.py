"""Keeps every prediction of the test set for whoever looks at single ones."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class TestRecorder(Callback):
    """Collects what ``test_step`` returns, on the CPU, in the order of the data.

    For tasks whose ``test_step`` returns a dict of tensors with one entry a sample, as those of lightkit do. With
    several processes each sees a part of the data, which is nobody's test set: then there is no result.
    """

    # Not a test class, whatever its name looks like to pytest.
    __test__ = False

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier test."""
        self._parts.clear()

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
        if trainer.world_size > 1 or not isinstance(outputs, dict):
            return
        for name, values in outputs.items():
            values = values.detach().cpu()
            self._parts[name].append(values.float() if values.is_floating_point() else values)

    def result(self) -> dict[str, Tensor]:
        """What was collected under each name, of the whole test; empty if there was none."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
