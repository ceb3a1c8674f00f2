"""The batch size is bounded by the number of samples and by the memory, and the data module stays as it was."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask
from lightkit.tuning import batch_size, find_batch_size
from lightkit.tuning.memory import available_memory, peak_memory

CPU = {"accelerator": "cpu"}


class Stream(IterableDataset):
    """Samples without a known number."""

    def __iter__(self):
        while True:
            yield torch.zeros(3), torch.tensor(0)


class Data(pl.LightningDataModule):
    """A number of samples; None for a stream."""

    def __init__(self, count):
        super().__init__()
        self.batch_size = 5
        self.count = count

    def train_dataloader(self):
        count = self.count
        data = Stream() if count is None else TensorDataset(torch.zeros(count, 3), torch.zeros(count, dtype=torch.long))
        return DataLoader(data, self.batch_size)


class Limited(ClassificationTask):
    """A task for which the memory suffices up to a number of samples."""

    def __init__(self, limit=2**20, message="CUDA out of memory. Tried to allocate 2 GiB"):
        super().__init__(torch.nn.Linear(3, 2), torch.optim.SGD)
        self.limit, self.message = limit, message
        self.sizes = []

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > self.limit:
            raise RuntimeError(self.message)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("count", "expected"), [(32 * 64, 64), (32 * 64 - 1, 32), (32 * 8, 8), (32 * 8 - 1, 4), (32, 1), (3, 1)]
)
def test_bound_by_samples(count, expected):
    """An epoch keeps 32 steps, and very few samples still make batches of one."""
    data = Data(count)
    random = torch.get_rng_state()
    found = find_batch_size(Limited, data, **CPU)
    assert found.batch_size == expected
    assert found.reason == f"an epoch of {count:,} samples has at least 32 steps"
    assert data.batch_size == 5 and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("count", "limit", "expected"), [(10**6, 100, 64), (None, 33, 32), (10**6, 3, 2)])
def test_bound_by_memory(count, limit, expected):
    """The size is the last one before the memory runs out, above and below the first size."""
    found = find_batch_size(lambda: Limited(limit), Data(count), **CPU)
    assert found.batch_size == expected
    assert found.reason == f"{2 * expected} do not fit into memory"


def test_bound_by_memory_of_the_machine(monkeypatch):
    """On a CPU, where the system would end the process, the growth of the process bounds the size."""
    peak = iter(range(0, 10**9, 2**20))
    monkeypatch.setattr(batch_size, "peak_memory", lambda: next(peak))
    monkeypatch.setattr(batch_size, "available_memory", lambda: 3 * 2**20)
    found = find_batch_size(Limited, Data(10**6), **CPU)
    assert (found.batch_size, found.reason) == (16, "32 would take more than half of the available memory")


def test_memory_of_this_machine():
    """The numbers are bytes of a machine that runs this test."""
    assert 2**24 < peak_memory() < 2**45
    assert available_memory() is None or 2**20 < available_memory() < 2**45


def test_errors():
    """A model that never fits, an error of another kind and wrong arguments are said as they are."""
    data = Data(1000)
    with pytest.raises(ConfigError, match="a batch of one sample does not fit into memory"):
        find_batch_size(lambda: Limited(0), data, **CPU)
    with pytest.raises(RuntimeError, match="another error"):
        find_batch_size(lambda: Limited(0, "another error"), data, **CPU)
    assert data.batch_size == 5
    with pytest.raises(ValueError, match="min_steps must be at least 1, got 0"):
        find_batch_size(Limited, data, min_steps=0)
    with pytest.raises(ConfigError, match="LightningDataModule has no batch_size to search for"):
        find_batch_size(Limited, pl.LightningDataModule(), **CPU)
