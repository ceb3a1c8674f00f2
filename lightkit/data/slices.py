"""Slices batches out of a TensorDataset, where a DataLoader would fetch them item by item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data._utils.fetch import _MapDatasetFetcher


def fetch_slices(loader: Any) -> Callable[[], None] | None:
    """Makes a DataLoader take a batch by one indexing operation for each tensor, in place.

    The batches, their order and the random numbers drawn for it stay the same: samplers are left alone. That goes
    where the data set is a plain ``TensorDataset``, collated as by default, without worker processes.

    Args:
        loader: a ``DataLoader``, or anything else, which stays as it is. Iterators that exist are changed too.

    Returns:
        A function that makes it as it was, or None if nothing has been changed.
    """
    if (
        type(loader) is not DataLoader
        or type(loader.dataset) is not TensorDataset
        or loader.collate_fn is not default_collate
        or loader.num_workers != 0
        or loader.batch_sampler is None
        or "__getitems__" in vars(loader.dataset)
        or not all(type(t) is Tensor and t.layout == torch.strided for t in loader.dataset.tensors)
    ):
        return None
    tensors = loader.dataset.tensors

    def slices(indices: list[int]) -> list[Tensor]:
        chosen = torch.as_tensor(indices)
        # As default_collate has it: a list of new, contiguous tensors. Not index_select: a sampler may count from
        # the end.
        return [t[chosen].contiguous() for t in tensors]

    loader.dataset.__getitems__ = slices
    loader.collate_fn = _as_it_is

    def undo() -> None:
        vars(loader.dataset).pop("__getitems__", None)
        loader.collate_fn = default_collate

    return undo


def fetch_slices_now(iterator: Any) -> None:
    """Tells an iterator that a loader has already made what `fetch_slices` has told the loader."""
    fetcher = getattr(iterator, "_dataset_fetcher", None)
    if isinstance(fetcher, _MapDatasetFetcher) and "__getitems__" in vars(fetcher.dataset):
        fetcher.collate_fn = _as_it_is


def _as_it_is(batch: list[Tensor]) -> list[Tensor]:
    return batch
