"""Slices batches out of a TensorDataset, where a DataLoader would fetch them item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from lightkit._util.stand_in import StandIn


def fetch_slices(loader: Any, iterators: Iterable[Any] = ()) -> Callable[[], None] | None:
    """Makes a DataLoader take a batch by one indexing operation for each tensor, in place.

    The batches, their order and the random numbers drawn for it stay the same: samplers are left alone. That goes
    where the data set is a plain ``TensorDataset``, collated as by default, without worker processes. The data set
    is not touched: other loaders of it are as they were.

    Args:
        loader: a ``DataLoader``, or anything else, which stays as it is.
        iterators: those of them that the loader has made already take slices from now on too.

    Returns:
        A function that makes the loader as it was, or None if nothing has been changed.
    """
    if (
        type(loader) is not DataLoader
        or type(loader.dataset) is not TensorDataset
        or "__getitem__" in vars(loader.dataset)
        or "__getitems__" in vars(loader.dataset)
        or loader.collate_fn is not default_collate
        or loader.num_workers != 0
        or loader.batch_sampler is None
        or "_get_iterator" in vars(loader)
        or not all(type(t) is Tensor and t.layout == torch.strided for t in loader.dataset.tensors)
    ):
        return None
    for iterator in iterators:
        if type(iterator) is _SingleProcessDataLoaderIter and iterator._dataset is loader.dataset:
            # The data set of another loader may be the same, but not what that makes of it.
            if iterator._index_sampler is loader.batch_sampler and iterator._collate_fn is default_collate:
                iterator._dataset_fetcher = _Slices(loader.dataset)
    # A copy of the loader is as any other.
    return StandIn(loader, "_get_iterator", partial(_slicing_iterator, loader)).undo


def _slicing_iterator(loader: DataLoader) -> Any:
    iterator = DataLoader._get_iterator(loader)
    iterator._dataset_fetcher = _Slices(loader.dataset)
    return iterator


class _Slices:
    """What an iterator of a DataLoader asks for its batches."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._dataset = dataset

    def fetch(self, indices: Iterable[int]) -> list[Tensor]:
        """The samples at these indices, as default_collate has them: a list of new, contiguous tensors."""
        # A batch sampler may yield anything that can be iterated over.
        chosen = torch.as_tensor(indices if isinstance(indices, (list, Tensor)) else list(indices))
        # Not index_select: a sampler may count from the end.
        return [tensor[chosen].contiguous() for tensor in self._dataset.tensors]
