"""Private parts of Lightning's running values, and of the connector that collects them."""

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

# Keys in ``vars(metric)``: the value of the last step, the cached result, and how often it was updated.
FORWARD_VALUE = "_forward_cache"
COMPUTED = "_computed"
UPDATE_COUNT = "_update_count"

# Keys in ``vars(connector)``: False after the first batch of an epoch, and the hook that logged last.
FIRST_ITERATION = "_first_loop_iter"
CONNECTOR_HOOK = "_current_fx"


def extract_batch_size_of(results: ResultCollection) -> Callable[[ResultMetric, int | None, Any], int]:
    """Returns the method that finds the batch size of a logged value, from the batch if it was not given."""
    return results._extract_batch_size


def logged_metrics(connector: LoggerConnector) -> dict[str, Any]:
    """Returns the dict of the metrics that loggers were given."""
    return connector._logged_metrics


def collected_metrics(connector: LoggerConnector) -> dict[str, dict[str, Any]]:
    """Returns the connector's own dicts by the names that `ResultCollection.metrics` gives them."""
    return {
        "pbar": connector._progress_bar_metrics,
        "callback": connector._callback_metrics,
        "log": connector._logged_metrics,
    }


def metrics_of_step(results: ResultCollection, values: Mapping[str, Tensor | None]) -> Mapping[str, Any]:
    """Returns what `ResultCollection.metrics` would return if the last step had had other values.

    Args:
        results: its running values stay as they are.
        values: what the step logged, by key of `results`.
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
