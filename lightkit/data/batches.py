"""Batches that index tensors in memory, and the parts of a data module that serve them."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.strategy_traits import traits_of
from lightkit.errors import DataError

_Part = TypeVar("_Part")


class Shard(TypedDict):
    """The arguments of `TensorBatches` that select the samples of one process."""

    rank: int
    world_size: int


class _Position(TypedDict):
    epoch: int
    batch: int
    batch_size: int


class BatchNumber(NamedTuple):
    """The number of a batch, from which the seed of its random draws follows.

    Attributes:
        epoch: the epoch.
        batch: the number of the batch in the epoch.
        rank: the rank of the process that gets the batch.
    """

    epoch: int
    batch: int
    rank: int

    def seed(self, seed: int) -> int:
        """Returns a seed of 63 bits for this batch, which depends on all of its numbers and on ``seed``."""
        return random.Random(f"{seed} {self.epoch} {self.batch} {self.rank}").getrandbits(63)


class BatchesState(_Position, total=False):
    """The position of `TensorBatches` that a checkpoint contains; old checkpoints have no ``world_size``."""

    world_size: int


def shard_kwargs(trainer: pl.Trainer | None, training: bool) -> Shard:
    """Returns the ``rank`` and ``world_size`` that `TensorBatches` takes in this process.

    Args:
        trainer: the trainer; None stands for a single process.
        training: True for batches of training. For other batches every process gets all samples if the traits of the
            strategy have ``replicates_evaluation``.
    """
    if trainer is None or (not training and traits_of(trainer.strategy).replicates_evaluation):
        return {"rank": 0, "world_size": 1}
    return {"rank": trainer.global_rank, "world_size": trainer.world_size}


def to_training_device(trainer: pl.Trainer | None, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies tensors to the trainer's GPU if together they take at most a quarter of its free memory.

    The batches are then cut on the GPU, and no step waits for a copy. Otherwise, or without a GPU, the tensors stay
    where they are.

    Returns:
        The tensors on the GPU, or the given ones.
    """
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    if device.type == "cuda" and 4 * sum(t.nbytes for t in tensors) <= torch.cuda.mem_get_info(device)[0]:
        return tuple(t.to(device) for t in tensors)
    return tuple(tensors)


def check_positive(**values: int) -> None:
    """Rejects arguments of a data module that are below 1.

    Args:
        **values: the arguments by their names.

    Raises:
        DataError: an argument is below 1; the message has the name and the value of the first one.
    """
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")


def after_setup(part: _Part | None) -> _Part:
    """Returns ``part``, an attribute of a data module that its ``setup`` assigns.

    Raises:
        RuntimeError: ``part`` is None, because ``setup`` has not been called.
    """
    if part is None:
        raise RuntimeError("the data module has no data yet: call its setup() first")
    return part


class Batches:
    """A base class of iterables over batches of samples that are known by their index.

    The order of an epoch depends only on ``seed`` and on the number of the epoch, so that a resumed run gets the
    batches that the stopped run would have got. Lightning saves the position, `state_dict`, in its checkpoints.

    With several processes, each process gets every ``world_size``-th sample. With ``shuffle``, an epoch repeats its
    first samples at the end so that all processes have the same number of batches; without, it repeats no sample.

    A subclass defines `_serve`.

    Args:
        total: the number of samples of all processes together.
        batch_size: the number of samples in a batch of this process; the last batch may be smaller.
        shuffle: True draws a new order in each epoch; False keeps the order of the samples.
        seed: the seed of the order with ``shuffle``.
        rank: the rank of this process.
        world_size: the number of processes.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._total = total
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._batch = 0
        self._resuming = False
        # True adds a `BatchNumber` to each batch.
        self.is_numbered = False

    @property
    def num_samples(self) -> int:
        """The number of samples that this process gets in an epoch."""
        return self._num_samples(self.world_size)

    def _num_samples(self, world_size: int) -> int:
        total = self._total
        return -(-total // world_size) if self.shuffle else len(range(self.rank, total, world_size))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    # Lightning reads this attribute of every loader that has a sampler.
    batch_sampler = None

    @property
    def sampler(self) -> Batches:
        """This object: Lightning calls ``set_epoch`` of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration serves; without a call the next iteration serves the next epoch."""
        if self._resuming and epoch == self._epoch:
            return
        self._epoch, self._batch, self._resuming = epoch, 0, False

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        # This code runs at the first batch and not at iter(): Lightning makes iterators that it never reads.
        if self._batch > 0 and not (self._resuming and self._batch < len(self)):
            self._epoch, self._batch = self._epoch + 1, 0
        self._resuming = False
        batches = self._serve(self._order(self._epoch), self._batch)
        for index, batch in enumerate(batches, start=self._batch):
            self._batch = index + 1
            yield (*batch, BatchNumber(self._epoch, index, self.rank)) if self.is_numbered else batch

    @abstractmethod
    def _serve(self, order: Tensor | None, first: int) -> Iterator[tuple[Tensor, ...]]:
        """Yields the batches of an epoch from the number ``first`` on.

        Args:
            order: the indices of this process's samples, int64; None stands for all samples in their order.
            first: the number of batches that are left out at the beginning.
        """

    def _slices(self, first: int) -> Iterator[slice]:
        """Yields the part of the order that belongs to each batch, from the number ``first`` on."""
        for index in range(first, len(self)):
            yield slice(index * self.batch_size, (index + 1) * self.batch_size)

    def _order(self, epoch: int) -> Tensor | None:
        """Returns the int64 indices of this process's samples; None stands for all samples in their order."""
        total = self._total
        if self.shuffle:
            # Python's random hashes the whole string; torch would give seeds that share 32 bits the same epochs.
            mixed = random.Random(f"{self.seed} {epoch}").getrandbits(32)
            order = torch.randperm(total, generator=torch.Generator().manual_seed(mixed))
            if self.world_size == 1:
                return order
            padded = self.num_samples * self.world_size
            return order.repeat(-(-padded // max(total, 1)))[self.rank : padded : self.world_size]
        return torch.arange(total)[self.rank :: self.world_size] if self.world_size > 1 else None

    def state_dict(self) -> BatchesState:
        """Returns the epoch, the number of batches served in it, the batch size and the number of processes."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: BatchesState) -> None:
        """Makes the next iteration continue at a saved position, unless `set_epoch` sets another epoch.

        If the number of processes has changed, the position is the number of samples that all processes together have
        served, rounded down to a whole number of batches; the samples of a part of a batch are served again.

        Args:
            state: the result of `state_dict`.

        Raises:
            DataError: the position is within an epoch, and ``state`` has another batch size. The batch size may differ
                if the samples per batch of all processes together are the same.
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


class TensorBatches(Batches):
    """An iterable over batches: each batch is a tuple with the same samples of each tensor.

    One indexing operation per tensor and batch replaces the fetching and collating of a DataLoader. Order and position
    are those of `Batches`.

    Args:
        tensors: one or more tensors of equal length in dimension 0, on one device; the batches are on that device.
        batch_size: the number of samples in a batch of this process; the last batch may be smaller.
        shuffle: True draws a new order in each epoch; False keeps the order of the tensors.
        seed: the seed of the order with ``shuffle``.
        rank: the rank of this process.
        world_size: the number of processes.

    Raises:
        ValueError: there are no tensors, their lengths differ, or ``batch_size`` is below 1.
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
        super().__init__(lengths[0], batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.tensors = tuple(tensors)

    def _serve(self, order: Tensor | None, first: int) -> Iterator[tuple[Tensor, ...]]:
        if order is not None:
            order = order.to(self.tensors[0].device)
        for chosen in self._slices(first):
            if order is None:
                yield tuple(tensor[chosen] for tensor in self.tensors)
            else:
                yield tuple(tensor.index_select(0, order[chosen]) for tensor in self.tensors)


def batches_for(
    trainer: pl.Trainer | None, tensors: Sequence[Tensor], batch_size: int, *, shuffle: bool, seed: int
) -> TensorBatches:
    """Returns the batches of this process: its shard of tensors that lie on the trainer's GPU if they fit there.

    Args:
        trainer: the trainer; None stands for a single process on the CPU.
        tensors: as for `TensorBatches`.
        batch_size: the number of samples in a batch of this process.
        shuffle: True for batches of training, in a new order in each epoch; False for batches of evaluation, in order.
        seed: the seed of the order with ``shuffle``.
    """
    shard = shard_kwargs(trainer, training=shuffle)
    return TensorBatches(to_training_device(trainer, tensors), batch_size, shuffle=shuffle, seed=seed, **shard)
