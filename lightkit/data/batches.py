"""Batches sliced from tensors that lie in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.strategy_traits import traits_of
from lightkit.errors import DataError


def shard_kwargs(trainer: pl.Trainer | None, training: bool) -> dict[str, int]:
    """Returns the ``rank`` and ``world_size`` that select a process's part of the samples.

    A strategy that replicates evaluation gives every process all samples outside training.
    """
    if trainer is None or (not training and traits_of(trainer.strategy).replicates_evaluation):
        return {"rank": 0, "world_size": 1}
    return {"rank": trainer.global_rank, "world_size": trainer.world_size}


def near_training(trainer: pl.Trainer | None, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors on the GPU that trains, where they take at most a quarter of what is free there; else as they are.

    Batches are then cut out on the GPU, and no step waits for a copy.
    """
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    if device.type == "cuda" and 4 * sum(t.nbytes for t in tensors) <= torch.cuda.mem_get_info(device)[0]:
        return tuple(t.to(device) for t in tensors)
    return tuple(tensors)


class TensorBatches:
    """Iterates over batches of tensors, each batch one slice of each tensor.

    What a DataLoader does item by item, and then collates, is one indexing operation a batch here. The order
    of an epoch depends on ``seed`` and on the number of the epoch alone, so that a run that was stopped
    anywhere resumes with the very batches it had before it: the position is in ``state_dict``, which Lightning
    saves with its checkpoints.

    With several processes each gets every ``world_size``-th sample. In training (``shuffle``) the samples are
    filled up from the front so that all have the same number of batches; in evaluation no sample is repeated.

    Args:
        tensors: of equal length in dimension 0, on one device, where the batches are, too.
        batch_size: samples in a batch; the last may be smaller.
        shuffle: a new order in each epoch.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: no tensors or of different lengths, a batch size below 1.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if not lengths or len(set(lengths)) != 1:
            raise ValueError(f"tensors must be one or more of equal length, got lengths {lengths}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tensors = tuple(tensors)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._batch = 0
        self._resuming = False

    @property
    def num_samples(self) -> int:
        """Samples of an epoch in this process."""
        return self._num_samples(self.world_size)

    def _num_samples(self, world_size: int) -> int:
        total = len(self.tensors[0])
        return -(-total // world_size) if self.shuffle else len(range(self.rank, total, world_size))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    # Lightning asks for it wherever there is a sampler.
    batch_sampler = None

    @property
    def sampler(self) -> TensorBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; without it, each iteration is the next one."""
        if self._resuming and epoch == self._epoch:
            return
        self._epoch, self._batch, self._resuming = epoch, 0, False

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # Runs at the first batch, not at iter(): Lightning makes iterators that it never asks for one.
        if self._batch > 0 and not (self._resuming and self._batch < len(self)):
            self._epoch, self._batch = self._epoch + 1, 0
        self._resuming = False
        order = self._order(self._epoch)
        if order is not None:
            order = order.to(self.tensors[0].device)
        for index in range(self._batch, len(self)):
            chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
            self._batch = index + 1
            if order is None:
                yield tuple(tensor[chosen] for tensor in self.tensors)
            else:
                yield tuple(tensor.index_select(0, order[chosen]) for tensor in self.tensors)

    def _order(self, epoch: int) -> Tensor | None:
        """Indices of this process's samples, or None for all of them as they stand."""
        total = len(self.tensors[0])
        if self.shuffle:
            # A hash of both: neighbouring seeds must not share epochs, and torch looks at 32 bits of a seed.
            mixed = random.Random(f"{self.seed} {epoch}").getrandbits(32)
            order = torch.randperm(total, generator=torch.Generator().manual_seed(mixed))
            if self.world_size == 1:
                return order
            everyone = self.num_samples * self.world_size
            return order.repeat(-(-everyone // max(total, 1)))[self.rank : everyone : self.world_size]
        return torch.arange(total)[self.rank :: self.world_size] if self.world_size > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches, of which size, have been handed out."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there, unless `set_epoch` says it is another epoch.

        With another number of processes, what all of them together have had counts. Where that is no whole number of
        their batches now, a part of one comes again.

        Raises:
            DataError: the position is in the middle of an epoch, in batches of another size.
        """
        world_size = state.get("world_size", self.world_size)
        taken = state["batch"] * state["batch_size"]
        at_its_end = taken >= self._num_samples(world_size)
        same_together = state["batch_size"] * world_size == self.batch_size * self.world_size
        if not at_its_end and state["batch_size"] != self.batch_size and not same_together:
            raise DataError(
                f"batch_size is {self.batch_size}, but the run to go on with was saved with batches of "
                f"{state['batch_size']}: its place in the data is counted in those"
            )
        self._epoch = int(state["epoch"])
        self._batch = len(self) if at_its_end else taken * world_size // (self.batch_size * self.world_size)
        self._resuming = True
