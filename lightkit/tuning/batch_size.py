"""A search for the largest batch size that fits into memory and leaves an epoch enough steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng

from lightkit.errors import ConfigError
from lightkit.tuning.memory import available_memory, peak_memory
from lightkit.tuning.trial import run_trial

_FIRST_SIZE = 8

# The steps of a trial: the first one allocates the state of the optimizer.
_STEPS = 2

# The part of the available memory that a batch may take by estimate on a CPU, where the system ends a process that
# takes too much.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class BatchSizeSearch:
    """The result of `find_batch_size`.

    Args:
        batch_size: the chosen batch size, a power of two.
        reason: the reason why the size is not larger, for a message.
    """

    batch_size: int
    reason: str


def find_batch_size(
    make_module: Callable[[], pl.LightningModule],
    data: pl.LightningDataModule,
    *,
    min_steps: int = 32,
    **options: Any,
) -> BatchSizeSearch:
    """Finds the largest power of two that fits into memory, and with which an epoch has at least ``min_steps`` batches.

    The function trains a new module for two steps with each size, and doubles the size until it does not fit. On a GPU
    a size does not fit if the memory runs out. On a CPU it does not fit if it is estimated to take more than half of
    the available memory; the estimate is twice the growth from one size to the next. Random generators and
    ``data.batch_size`` are the same afterwards as before.

    Args:
        make_module: a function that returns a new module.
        data: the data module, whose attribute ``batch_size`` is the size of a batch of training.
        min_steps: the least number of batches in an epoch. More samples in a batch train faster and learn less from
            each sample.
        **options: further arguments of Lightning's Trainer, such as ``accelerator`` or ``precision``.

    Raises:
        ConfigError: the data module has no ``batch_size``, or one sample does not fit.
        ValueError: ``min_steps`` is below 1.
    """
    if min_steps < 1:
        raise ValueError(f"min_steps must be at least 1, got {min_steps}")
    if not hasattr(data, "batch_size"):
        raise ConfigError(f"{type(data).__name__} has no batch_size to search for")
    batches: Any = data
    before = batches.batch_size
    try:
        with isolate_rng():
            return _Search(make_module, batches, options).run(min_steps)
    finally:
        batches.batch_size = before


class _Search:
    """The trials of one search."""

    def __init__(self, make_module: Callable[[], pl.LightningModule], data: Any, options: dict[str, Any]) -> None:
        self._make_module, self._data, self._options = make_module, data, options
        self._samples: float = math.inf

    def run(self, min_steps: int) -> BatchSizeSearch:
        """Returns the largest size that fits."""
        size = _FIRST_SIZE
        while not self._fits(size):
            if size == 1:
                raise ConfigError("a batch of one sample does not fit into memory")
            size //= 2
        if size < _FIRST_SIZE:
            return BatchSizeSearch(size, f"{2 * size} do not fit into memory")
        if self._samples < size * min_steps:
            size = 1 << max(0, int(self._samples // min_steps).bit_length() - 1)
            return BatchSizeSearch(size, self._reason(min_steps))
        growth = 0
        while 2 * size * min_steps <= self._samples:
            available = available_memory()
            if self._is_on_cpu and available is not None and 2 * growth > _MEMORY_SHARE * available:
                return BatchSizeSearch(size, f"{2 * size} would take more than half of the available memory")
            peak = peak_memory()
            if not self._fits(2 * size):
                return BatchSizeSearch(size, f"{2 * size} do not fit into memory")
            growth = max(growth, peak_memory() - peak)
            size *= 2
        return BatchSizeSearch(size, self._reason(min_steps))

    def _reason(self, min_steps: int) -> str:
        return f"an epoch of {int(self._samples):,} samples has at least {min_steps} steps"

    def _fits(self, size: int) -> bool:
        self._data.batch_size = size
        try:
            trainer = run_trial(self._make_module(), self._data, _STEPS, **self._options)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_oom_error(error):
                raise
            failed = True
        else:
            failed = False
            self._samples = _count_samples(trainer.train_dataloader, size)
            self._is_on_cpu = trainer.strategy.root_device.type == "cpu"
        if failed:
            # The exception, which has the tensors of the trial, is gone here.
            garbage_collection_cuda()
        return not failed


def _count_samples(loader: Any, batch_size: int) -> float:
    """Returns the number of samples in an epoch; infinity for data without a length."""
    if isinstance(count := getattr(loader, "num_samples", None), int):
        return count
    parts: list[tuple[Any, int]] = [(getattr(loader, "dataset", None), 1), (loader, batch_size)]
    for part, factor in parts:
        try:
            return len(part) * factor
        except TypeError:
            continue
    return math.inf
