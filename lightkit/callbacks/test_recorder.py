"""A callback that keeps what ``test_step`` returns for the test set."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class TestRecorder(Callback):
    """Collects the outputs of ``test_step`` on the CPU in the order of the data.

    The ``test_step`` of the task must return a dict of tensors with one entry per sample, as the tasks of lightkit do;
    other outputs, such as scalars, are ignored. With several processes, only process 0 has a result, with the outputs
    of all processes.
    Each process must then get every ``world_size``-th sample, as from `lightkit.data.TensorBatches` or torch's
    ``DistributedSampler``; otherwise the result is empty.
    """

    # pytest would collect a class of this name.
    __test__ = False

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the outputs of an earlier test."""
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
        """Copies the outputs of a batch to the CPU, those in half precision as float32."""
        if not isinstance(outputs, dict) or not _has_samples(outputs):
            return
        for name, values in outputs.items():
            values = values.detach().cpu()
            self._parts[name].append(values.float() if values.dtype in (torch.float16, torch.bfloat16) else values)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the outputs of all processes in process 0."""
        if not dist.is_initialized():
            return
        gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
        dist.gather_object(self.result(), gathered)
        loaders: Any = trainer.test_dataloaders
        self._parts.clear()
        if gathered is not None and gathered[0] and not isinstance(loaders, (list, dict)):
            # A sampler repeats the first samples so that all processes have equally many.
            total = len(loaders.dataset) if hasattr(loaders, "dataset") else None
            merged = {name: _interleave([part[name] for part in gathered])[:total] for name in gathered[0]}
            self._parts |= {name: [values] for name, values in merged.items() if len(values)}

    def result(self) -> dict[str, Tensor]:
        """Returns the outputs of the whole test by name, each a CPU tensor with N entries; empty without outputs."""
        # The outputs of a user's task may have another shape in each batch, which nothing can read as a whole.
        alike = {name: parts for name, parts in self._parts.items() if len({part.shape[1:] for part in parts}) == 1}
        return {name: torch.cat(parts) for name, parts in alike.items()}


def _has_samples(outputs: dict[Any, Any]) -> bool:
    """Returns True if each of the outputs is a tensor, and all have the same number of samples."""
    tensors = [values for values in outputs.values() if isinstance(values, Tensor) and values.dim() > 0]
    return len(tensors) == len(outputs) and len({len(values) for values in tensors}) == 1


def _interleave(parts: list[Tensor]) -> Tensor:
    """Returns the samples of all processes in the order of the data.

    Args:
        parts: the samples of each process by rank.

    Returns:
        The samples; none if the lengths of ``parts`` are not those of every ``world_size``-th sample.
    """
    total = sum(map(len, parts))
    whole = parts[0].new_empty(total, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        if len(part) != len(range(rank, total, len(parts))):
            return whole[:0]
        whole[rank :: len(parts)] = part
    return whole
