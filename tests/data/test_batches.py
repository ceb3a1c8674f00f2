"""Batches from memory: every sample once an epoch, the same order for the same seed, resumable anywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkit.data import TensorBatches
from lightkit.data.batches import to_training_device
from lightkit.errors import DataError


def numbers(batches):
    return [int(value) for (batch,) in batches for value in batch]


@given(total=st.integers(0, 50), size=st.integers(1, 60), shuffle=st.booleans())
def test_every_sample_once(total, size, shuffle):
    """An epoch has each sample once, in batches of the given size except the last."""
    batches = TensorBatches([torch.arange(total)], size, shuffle=shuffle)
    sizes = [len(batch) for (batch,) in batches]
    assert sorted(numbers(batches)) == list(range(total))
    assert len(sizes) == len(batches)
    assert all(s == size for s in sizes[:-1])


def test_order_is_that_of_seed_and_epoch():
    """Epochs differ, seeds differ, and each order can be repeated."""
    make = lambda seed: TensorBatches([torch.arange(100)], 7, shuffle=True, seed=seed)  # noqa: E731
    first, same, other = make(0), make(0), make(1)
    one, two = numbers(first), numbers(first)
    assert one != two
    assert [numbers(same), numbers(same)] == [one, two]
    assert numbers(other) not in (one, two)
    again = make(0)
    again.set_epoch(1)
    assert numbers(again) == two


def test_tensors_stay_together():
    """Images and labels of a batch belong to each other."""
    for left, right in TensorBatches([torch.arange(50), torch.arange(50) * 10], 8, shuffle=True):
        assert torch.equal(left * 10, right)


@given(total=st.integers(1, 40), world=st.integers(1, 5), size=st.integers(1, 8))
def test_processes_share_the_samples(total, world, size):
    """In training all processes have equally many batches and every sample; in evaluation none is repeated."""
    training = [
        TensorBatches([torch.arange(total)], size, shuffle=True, rank=r, world_size=world) for r in range(world)
    ]
    assert len({len(b) for b in training}) == 1
    assert len({len(n) for n in map(numbers, training)}) == 1
    for batches in training:
        batches.set_epoch(0)
    assert set().union(*map(numbers, training)) == set(range(total))
    evaluation = [TensorBatches([torch.arange(total)], size, rank=r, world_size=world) for r in range(world)]
    assert sorted(n for b in evaluation for n in numbers(b)) == list(range(total))


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_resume_anywhere(taken):
    """A loader with the saved position serves the rest of the epoch, then the next epoch."""
    original = TensorBatches([torch.arange(20)], 4, shuffle=True, seed=3)
    numbers(original)
    iterator = iter(original)
    for _ in range(taken):
        next(iterator)
    state = original.state_dict()
    rest = numbers(iterator)
    following = numbers(original)

    resumed = TensorBatches([torch.arange(20)], 4, shuffle=True, seed=3)
    resumed.load_state_dict(state)
    # Lightning makes an iterator that it does not read.
    iter(resumed)
    if 0 < taken < 5:
        assert numbers(resumed) == rest
        assert numbers(resumed) == following


def test_next_epoch_after_resuming_at_the_end_of_one():
    """A position at the end of an epoch has no rest: the next epoch begins at its start."""
    original = TensorBatches([torch.arange(20)], 4, shuffle=True, seed=3)
    numbers(original)
    resumed = TensorBatches([torch.arange(20)], 4, shuffle=True, seed=3)
    resumed.load_state_dict(original.state_dict())
    resumed.set_epoch(1)
    assert numbers(resumed) == numbers(original)


def test_resume_with_another_batch_size():
    """A position within an epoch is rejected; at the end of an epoch the size may change."""
    original = TensorBatches([torch.arange(20)], 4, shuffle=True)
    iterator = iter(original)
    next(iterator)
    other = TensorBatches([torch.arange(20)], 2, shuffle=True)
    with pytest.raises(DataError, match=r"batch_size is 2, but .* batches of 4"):
        other.load_state_dict(original.state_dict())
    list(iterator)
    other.load_state_dict(original.state_dict())
    assert numbers(other) == numbers(original)


@pytest.mark.parametrize("shuffle_seed", [0, 1])
@pytest.mark.parametrize(
    ("before", "after"), [((1, 8), (2, 4)), ((2, 4), (1, 8)), ((2, 4), (1, 4)), ((1, 4), (2, 4)), ((4, 2), (2, 2))]
)
def test_resume_with_another_number_of_processes(before, after, shuffle_seed):
    """The rest of the epoch is dealt out again: no sample is left out, none is repeated.

    An exception is part of a batch, if the position is within a new batch.
    """
    total = 64

    def loaders(world, size):
        return [
            TensorBatches([torch.arange(total)], size, shuffle=True, seed=shuffle_seed, rank=rank, world_size=world)
            for rank in range(world)
        ]

    first = loaders(*before)
    taken = []
    for loader in first:
        iterator = iter(loader)
        for _ in range(3):
            taken += next(iterator)[0].tolist()
    second = loaders(*after)
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    rest = [number for loader in second for number in numbers(loader)]
    together = after[0] * after[1]
    again = len(taken) % together
    assert sorted(set(taken) | set(rest)) == list(range(total))
    assert len(taken) + len(rest) == total + again
    # At the end of an epoch nothing is left: any size is accepted.
    whole = loaders(*before)
    for loader in whole:
        numbers(loader)
    for loader in loaders(after[0], after[1] + 1):
        loader.load_state_dict(whole[0].state_dict())
        loader.set_epoch(1)
        assert len(numbers(loader)) == total // after[0]


@pytest.mark.parametrize(
    ("tensors", "size", "message"),
    [
        ([], 1, "equal length"),
        ([torch.zeros(2), torch.zeros(3)], 1, "equal length"),
        ([torch.zeros(2)], 0, "at least 1"),
    ],
)
def test_wrong_arguments(tensors, size, message):
    """The constructor rejects impossible arguments."""
    with pytest.raises(ValueError, match=message):
        TensorBatches(tensors, size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_are_where_the_tensors_are(world_size):
    """Indices follow the tensors to their device, here "meta"."""
    tensors = (torch.empty(10, 3, device="meta"), torch.empty(10, device="meta"))
    batches = list(TensorBatches(tensors, 4, shuffle=True, world_size=world_size))
    assert [(b.device.type, b.shape) for b in batches[0]] == [("meta", (4, 3)), ("meta", (4,))]


@pytest.mark.parametrize(
    ("device", "free", "moved"),
    [("cuda", 40, True), ("cuda", 39, False), ("cpu", 1000, False)],
    ids=["fits", "too large", "no GPU"],
)
def test_data_go_to_a_gpu_with_room_for_them(device, free, moved, monkeypatch):
    """Tensors are copied if they take a quarter of the free memory or less."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    device = torch.device(device, 0)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=device))
    tensors = [SimpleNamespace(nbytes=size, to=lambda to, size=size: (size, to)) for size in (4, 6)]
    expected = ((4, device), (6, device)) if moved else tuple(tensors)
    assert to_training_device(trainer, tensors) == expected
    assert to_training_device(None, tensors) == tuple(tensors)
