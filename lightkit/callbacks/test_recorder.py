"""Keeps every prediction of the test set for whoever looks at single ones."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class TestRecorder(Callback):
    """Collects what ``test_step`` returns, on the CPU, in the order of the data.

    For tasks whose ``test_step`` returns a dict of tensors with one entry a sample, as those of lightkit do. Of
    several processes the first has what all of them saw, if each got every ``world_size``-th sample, as `TensorBatches`
    and torch's ``DistributedSampler`` deal them out; else there is no result.
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
        if not isinstance(outputs, dict):
            return
        for name, values in outputs.items():
            values = values.detach().cpu()
            self._parts[name].append(values.float() if values.is_floating_point() else values)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the parts of all processes together."""
        if not dist.is_initialized():
            return
        gathered = [None] * trainer.world_size if trainer.is_global_zero else None
        dist.gather_object(self.result(), gathered)
        loaders = trainer.test_dataloaders
        self._parts.clear()
        if gathered is not None and gathered[0] and not isinstance(loaders, (list, dict)):
            # A sampler that gives all processes equally many samples has repeated some of the first.
            total = len(loaders.dataset) if hasattr(loaders, "dataset") else None
            merged = {name: _interleave([part[name] for part in gathered])[:total] for name in gathered[0]}
            self._parts |= {name: [values] for name, values in merged.items() if len(values)}

    def result(self) -> dict[str, Tensor]:
        """What was collected under each name, of the whole test; empty if there was none."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


def _interleave(parts: list[Tensor]) -> Tensor:
    """The samples of all processes in the order of the data; none if they were not dealt out in turns."""
    total = sum(map(len, parts))
    whole = parts[0].new_empty(total, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        if len(part) != len(range(rank, total, len(parts))):
            return whole[:0]
        whole[rank :: len(parts)] = part
    return whole
