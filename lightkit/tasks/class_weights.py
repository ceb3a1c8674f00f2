"""The weights of classes in the loss of a task: balanced by the labels of the training set, or given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightkit._lightning.loops import training_batches
from lightkit._util.printable import printable
from lightkit.data import TensorBatches
from lightkit.errors import ConfigError, DataError
from lightkit.nn import CrossEntropyLoss

# The number of classes that a message names.
_SHOWN = 3


def set_class_weights(loss: CrossEntropyLoss, trainer: pl.Trainer) -> None:
    """Sets balanced class weights of a loss before a fit, and checks given ones.

    The number of classes is ``num_classes`` of the data module, if it has this attribute, and else the largest label
    plus one.

    Args:
        loss: the loss.
        trainer: the trainer, whose data module has been set up.

    Raises:
        ConfigError: the number of given weights is not the number of classes.
        DataError: the weights are balanced, and a class has no training sample.
    """
    data: Any = getattr(trainer, "datamodule", None)
    num_classes = getattr(data, "num_classes", None)
    if loss.is_balanced:
        # Every process must have the same weights. Some strategies broadcast JSON values alone.
        counts = torch.tensor(trainer.strategy.broadcast(count_labels(trainer, num_classes).tolist()))
        absent = [_class_name(data, index) for index in (counts == 0).nonzero().flatten().tolist()]
        if absent or len(counts) == 0:
            more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
            raise DataError(
                f"weight=balanced of the loss: the training set has no sample of the class "
                f"{', '.join(absent[:_SHOWN])}{more}; give the weights as a list, or leave the class out"
            )
        loss.balance(counts)
    elif loss.weight is not None and num_classes is not None and len(loss.weight) != num_classes:
        raise ConfigError(f"weight of the loss has {len(loss.weight)} numbers, but the data has {num_classes} classes")


def count_labels(trainer: pl.Trainer, num_classes: int | None) -> Tensor:
    """Returns the number of training samples of each class, int64 ``(C)``.

    The labels are those of ``training_labels()`` of the data module, if it has this method. Else they are the last
    tensor of the batches, which are read once if they are not in memory.

    Args:
        trainer: the trainer, whose data module has been set up.
        num_classes: the number of classes C; None takes the largest label plus one.

    Raises:
        DataError: the batches have no labels, or a label is no integer in ``[0, C)``.
    """
    data: Any = getattr(trainer, "datamodule", None)
    parts = [data.training_labels()] if hasattr(data, "training_labels") else _labels_of(training_batches(trainer))
    counts = torch.zeros(num_classes or 0, dtype=torch.int64)
    for labels in parts:
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            shown = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"weight=balanced of the loss needs integer labels (N) in the batches, got {shown}")
        wrong = labels[(labels < 0) | ((labels >= num_classes) if num_classes is not None else (labels < 0))]
        if len(wrong):
            raise DataError(f"weight=balanced of the loss: the training set has the label {int(wrong[0])}")
        found = torch.bincount(labels.cpu().long(), minlength=len(counts))
        counts = torch.nn.functional.pad(counts, (0, len(found) - len(counts))) + found
    return counts


def _labels_of(batches: Any) -> Iterable[Any]:
    """Yields the labels of batches, the last entry of each; those of all at once if they are in memory."""
    if isinstance(batches, TensorBatches):
        yield batches.tensors[-1]
    elif isinstance(batches, DataLoader) and isinstance(batches.dataset, TensorDataset):
        yield batches.dataset.tensors[-1]
    else:
        # The order of the training must not depend on this pass.
        with torch.random.fork_rng(devices=[]):
            for batch in batches:
                yield batch[-1] if isinstance(batch, (tuple, list)) else batch


def _class_name(data: Any, index: int) -> str:
    names = getattr(data, "classes", None)
    return printable(str(names[index])) if names is not None and index < len(names) else str(index)
