"""A DataLoader that slices yields the batches of one that collates, to the bit and in the same order."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from lightkit.loops.slicing import fetch_slices


def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(23, 2, 3, generator=generator)
    return TensorDataset(images, torch.arange(23), images.to(torch.bfloat16).transpose(1, 2))


class FromTheEnd:
    """A sampler that yields negative indices."""

    def __len__(self):
        return 23

    def __iter__(self):
        return iter(range(-1, -24, -1))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_size": 5, "sampler": WeightedRandomSampler(torch.arange(1, 24).double(), 30)},
        {"batch_sampler": BatchSampler(range(23), 7, False)},
        {"batch_size": 1},
        {"batch_size": 3, "sampler": FromTheEnd()},
    ],
    # Without the address of a sampler, which differs from one worker of the tests to the other.
    ids=lambda options: str({name: value if isinstance(value, int) else name for name, value in options.items()}),
)
def test_same_batches(options):
    """Order, dtypes, layout and types are those of the default collation, for any sampler."""
    epochs = []
    for slicing in (False, True):
        torch.manual_seed(3)
        loader = DataLoader(dataset(), **options)
        if slicing:
            assert fetch_slices(loader) is not None
        epochs.append([*loader, *loader])
    assert len(epochs[0]) == len(epochs[1])
    for collated, sliced in zip(*epochs, strict=True):
        assert type(sliced) is type(collated)
        for own, other in zip(sliced, collated, strict=True):
            assert own.dtype == other.dtype and own.stride() == other.stride() and torch.equal(own, other)


def test_an_iterator_that_exists_already():
    """An existing iterator slices from then on; one that slices continues after the undo."""
    loader, expected = DataLoader(dataset(), batch_size=4), list(DataLoader(dataset(), batch_size=4))
    iterator = iter(loader)
    got = [next(iterator)]
    undo = fetch_slices(loader, [iterator, iter([])])
    got += iterator
    second = iter(loader)
    next(second)
    undo()
    assert "_get_iterator" not in vars(loader)
    for batches in (got, [expected[0], *second], list(loader)):
        torch.testing.assert_close(batches, expected, rtol=0, atol=0)


def test_other_loaders_of_the_same_data_are_as_they_were():
    """One loader of a shared data set may slice while the others collate."""
    shared = dataset()
    others = [
        lambda: DataLoader(shared, batch_size=5),
        lambda: DataLoader(Subset(shared, range(7)), batch_size=3),
        lambda: DataLoader(shared, batch_size=5, collate_fn=len),
    ]
    expected = [list(make()) for make in others]
    loader = DataLoader(shared, batch_size=4)
    waiting = [iter(make()) for make in others]
    assert fetch_slices(loader, waiting) is not None and fetch_slices(loader) is None
    list(loader)
    for make, iterator, batches in zip(others, waiting, expected, strict=True):
        torch.testing.assert_close([list(make()), list(iterator)], [batches, batches], rtol=0, atol=0)


def test_tensors_that_are_replaced():
    """A data set whose tensors are replaced between two epochs serves the new ones."""
    loader = DataLoader(dataset(), batch_size=23)
    fetch_slices(loader)
    list(loader)
    loader.dataset.tensors = (torch.ones(23),)
    assert torch.equal(next(iter(loader))[0], torch.ones(23))


class Own(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.tensor(index)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Own(), batch_size=2),
        lambda: DataLoader(Subset(dataset(), range(4)), batch_size=2),
        lambda: DataLoader(dataset(), batch_size=2, collate_fn=list),
        lambda: DataLoader(dataset(), batch_size=None),
        lambda: DataLoader(dataset(), batch_size=2, num_workers=1),
        lambda: [1, 2, 3],
    ],
)
def test_other_loaders_are_left_alone(loader):
    """A subclass of a data set, a collation or a loader may do anything."""
    made = loader()
    before = dict(vars(made)) if hasattr(made, "__dict__") else made
    assert fetch_slices(made) is None
    assert (dict(vars(made)) if hasattr(made, "__dict__") else made) == before


def test_an_index_out_of_range_is_an_error():
    """An index beyond the end fails as it does with single items."""
    loader = DataLoader(dataset(), batch_sampler=[[0, 23]])
    fetch_slices(loader)
    with pytest.raises(IndexError):
        list(loader)
