"""Simple rules to compare a model of a table with: the mean or the most frequent class, and a linear rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# The linear rule solves equations of as many unknowns; columns of categories beyond are left out.
_MAX_COLUMNS = 1000

# The share of the mean square that is added to each, so that the equations of equal columns have a solution.
_RIDGE = 1e-3

# The rows that are multiplied at once.
_CHUNK = 65_536

Rows = tuple[Tensor, Tensor, Tensor]


def evaluate(train: Rows, test: Rows, category_sizes: Sequence[int], num_classes: int | None) -> dict[str, float]:
    """Returns the test metrics of simple rules that the training rows determine.

    The linear rule is ridge regression on the numbers and on one column for each category; for classes it predicts a
    one-hot row, and takes the largest value.

    Args:
        train: numbers ``(N, F)``, categories ``(N, K)``, and labels ``(N)`` or targets ``(N)``.
        test: the same of the test.
        category_sizes: the number of indices of each category.
        num_classes: the number of classes; None for a regression.

    Returns:
        ``majority_accuracy`` and ``linear_accuracy``, or ``mean_mae``, ``mean_rmse``, ``linear_mae``, ``linear_rmse``.
    """
    if len(test[-1]) == 0:
        return {}
    target = train[-1]
    if num_classes is None:
        center = target.mean()
        linear = _predict(train, test, category_sizes, target[:, None])[:, 0]
        errors = {
            "mean": center - test[-1],
            "linear": linear - test[-1],
        }
        found = {f"{name}_mae": float(error.abs().mean()) for name, error in errors.items()}
        return found | {f"{name}_rmse": float(error.square().mean().sqrt()) for name, error in errors.items()}
    one_hot = functional.one_hot(target, num_classes).double()
    predicted = _predict(train, test, category_sizes, one_hot).argmax(dim=1)
    majority = target.bincount(minlength=num_classes).argmax()
    return {
        "majority_accuracy": float((test[-1] == majority).double().mean()),
        "linear_accuracy": float((test[-1] == predicted).double().mean()),
    }


def _predict(train: Rows, test: Rows, category_sizes: Sequence[int], targets: Tensor) -> Tensor:
    """Returns the predictions of a ridge regression of ``targets`` ``(N, C)`` for the test rows, float64 ``(M, C)``."""
    center = targets.mean(dim=0)
    first = _columns(train, category_sizes, slice(0, 1))
    width = first.shape[1]
    square, product = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, targets.shape[1]).double()
    for begin in range(0, len(targets), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        x = _columns(train, category_sizes, part)
        square += x.T @ x
        product += x.T @ (targets[part] - center)
    diagonal = square.diagonal()
    ridge = torch.diag(_RIDGE * diagonal.mean().clamp(min=1e-12) * torch.ones_like(diagonal))
    weights = torch.linalg.solve(square + ridge, product)
    parts = [
        _columns(test, category_sizes, slice(begin, begin + _CHUNK)) @ weights
        for begin in range(0, len(test[0]), _CHUNK)
    ]
    return torch.cat(parts) + center


def _columns(rows: Rows, category_sizes: Sequence[int], part: slice) -> Tensor:
    """Returns some rows as float64 ``(n, D)``: a one, the numbers, and one-hot rows of categories that have room."""
    numbers, categories = rows[0][part][:, :_MAX_COLUMNS].double(), rows[1][part]
    found, width = [numbers.new_ones(len(numbers), 1), numbers], numbers.shape[1]
    for index, size in enumerate(category_sizes):
        if width + size <= _MAX_COLUMNS:
            found.append(functional.one_hot(categories[:, index], size).double())
            width += size
    return torch.cat(found, dim=1)
