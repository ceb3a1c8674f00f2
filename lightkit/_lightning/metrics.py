"""Private parts of Lightning's `ResultCollection`, which has the running values of an epoch, and of its connector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector as LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection as ResultCollection
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from torch import Tensor

__all__ = [
    "COMPUTED",
    "CONNECTOR_HOOK",
    "FIRST_ITERATION",
    "FORWARD_VALUE",
    "UPDATE_COUNT",
    "LoggerConnector",
    "ResultCollection",
    "ResultMetric",
]

# Keys in ``vars(metric)``: the value of the last step, the cached result, and the number of updates of the metric.
FORWARD_VALUE = "_forward_cache"
COMPUTED = "_computed"
UPDATE_COUNT = "_update_count"

# Keys in ``vars(connector)``: False after the first batch of an epoch, and the hook that logged last.
FIRST_ITERATION = "_first_loop_iter"
CONNECTOR_HOOK = "_current_fx"


def extract_batch_size_of(results: ResultCollection) -> Callable[[ResultMetric, int | None, Any], int]:
    """Returns the method of ``results`` that returns the batch size of a logged value.

    The method takes the metric, the batch size or None, and the batch, from which it infers the size for None.
    """
    return results._extract_batch_size


def logged_metrics(connector: LoggerConnector) -> dict[str, Any]:
    """Returns the connector's own dict of the metrics that it has passed to the loggers."""
    return connector._logged_metrics


def collected_metrics(connector: LoggerConnector) -> dict[str, dict[str, Any]]:
    """Returns the connector's own dicts of metrics by the keys of `ResultCollection.metrics`: pbar, callback, log."""
    return {
        "pbar": connector._progress_bar_metrics,
        "callback": connector._callback_metrics,
        "log": connector._logged_metrics,
    }


def metrics_of_step(results: ResultCollection, values: Mapping[str, Tensor | None]) -> Mapping[str, Any]:
    """Returns what `ResultCollection.metrics` would return if the last step had logged ``values``.

    Args:
        results: the running values of the epoch; the function leaves them unchanged.
        values: the values of the step, by key of ``results``; the result has the metrics of these keys only.
    """
    part = ResultCollection(results.training)
    part.dataloader_idx = results.dataloader_idx
    part.update((key, results[key]) for key in values)
    own = {key: metric._forward_cache for key, metric in part.items()}
    try:
        for key, metric in part.items():
            metric._forward_cache = values[key]
        return part.metrics(on_step=True)
    finally:
        for key, metric in part.items():
            metric._forward_cache = own[key]
