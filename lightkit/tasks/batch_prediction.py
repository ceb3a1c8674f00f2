"""The prediction for one batch of inputs, with a task of lightkit or any other module."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.tasks.classification import ClassificationTask
from lightkit.tasks.forecast import ForecastTask
from lightkit.tasks.regression import RegressionTask


def predict_batch(task: pl.LightningModule, batch: Any) -> Tensor:
    """Returns the probabilities of classes, the values or the forecasts for a batch.

    Args:
        task: the task in evaluation mode.
        batch: a tensor of inputs, or a tuple of tensors as the task takes it. The function moves it to the device of
            the task, and floating-point inputs to the dtype of its weights.

    Returns:
        The predictions ``(N, ...)``, on the device of the task.
    """
    parameter = next(task.parameters(), None)
    if parameter is not None:
        # A series stays float64: its task converts differences.
        dtype = None if isinstance(task, ForecastTask) else parameter.dtype
        batch = _moved(batch, parameter.device, dtype)
    if isinstance(task, ForecastTask):
        return task.predict_step(batch, 0)["forecast"]
    if isinstance(task, (ClassificationTask, RegressionTask)):
        return task.predict_step(batch, 0)
    return task(batch)


def _moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Returns a tensor, or a tuple of tensors, on a device; floating point in ``dtype`` unless that is None."""
    if isinstance(batch, tuple):
        return tuple(_moved(tensor, device, dtype) for tensor in batch)
    return batch.to(device, dtype) if dtype is not None and batch.is_floating_point() else batch.to(device)
