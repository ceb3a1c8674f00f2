"""Labels and targets of samples: texts, numbers and one-hot rows become class indices or float64 values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.errors import DataError

# A class is a category; more of them than this are rather numbers.
_MAX_CLASSES = 10_000


def encode_labels(
    y: Any, classes: Sequence[str] | None = None, is_classification: bool | None = None
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Returns labels as int64 ``(N)`` with the names of the classes, or targets as float64 with None.

    Args:
        y: integers, truth values or texts ``(N)``, one-hot rows ``(N, C)``, or floating point ``(N)`` or ``(N, K)``.
        classes: the names of the classes; None takes the sorted values of ``y``.
        is_classification: True and False decide what ``y`` is; None decides by its dtype.

    Raises:
        DataError: ``y`` has another shape, a value that is not finite, or a label that is not one of ``classes``.
    """
    values = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if values.ndim == 2 and values.shape[1] == 1 and values.dtype.kind != "f":
        values = values[:, 0]
    if is_classification is not False and _is_one_hot(values):
        values = values.argmax(axis=1)
    if is_classification is None:
        is_classification = values.dtype.kind != "f"
    if not is_classification:
        return _to_targets(values), None
    if values.ndim != 1:
        raise DataError(f"y must be labels of shape (N), got {values.shape}")
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == values.round()).all()):
            raise DataError("y must be labels, and has values that are no whole numbers")
        values = values.astype(np.int64)
    # A label of the training may be a number, whose name is its text.
    texts = values.astype(str) if values.dtype.kind in "OUS" else None
    if classes is not None and texts is None and values.dtype.kind in "ui":
        named = [str(number) for number in range(len(classes))]
        own = list(map(str, classes))
        numbers = values.astype(np.int64)
        if own == named or not set(map(str, np.unique(values))) <= set(own):
            wrong = np.flatnonzero((numbers < 0) | (numbers >= len(own)))
            if len(wrong):
                raise DataError(
                    f"y has the label {numbers[wrong[0]]} in sample {wrong[0]}, but there are {len(own)} classes"
                )
            return torch.from_numpy(numbers), tuple(own)
    texts = values.astype(str) if texts is None else texts
    found, indices = np.unique(values if values.dtype.kind in "bui" else texts, return_inverse=True)
    names = [str(value) for value in found]
    if classes is None:
        if len(names) > _MAX_CLASSES:
            raise DataError(f"y has {len(names):,} different labels; make it floating point if they are numbers")
        return torch.from_numpy(indices.astype(np.int64)), tuple(names)
    place = {str(name): index for index, name in enumerate(classes)}
    if unknown := [name for name in names if name not in place]:
        raise DataError(f"y has the label {printable(unknown[0])!r}, which is not one of the {len(place)} classes")
    return torch.tensor([place[name] for name in names])[torch.from_numpy(indices)], tuple(map(str, classes))


def _is_one_hot(values: np.ndarray) -> bool:
    return values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind in "buif" and _has_one_per_row(values)


def _has_one_per_row(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all())


def _to_targets(values: np.ndarray) -> Tensor:
    if values.dtype.kind not in "buif" or values.ndim not in (1, 2):
        raise DataError(f"y must be labels (N) or numbers (N) or (N, K), got {values.dtype} of shape {values.shape}")
    targets = torch.from_numpy(values.astype(np.float64))
    wrong = (~targets.isfinite()).reshape(len(targets), -1).any(dim=1).nonzero()
    if len(wrong):
        raise DataError(f"y has a value that is not finite in sample {int(wrong[0])}")
    return targets
