"""Ensembles of trained tasks: one task that predicts the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightkit.errors import ConfigError
from lightkit.models import Ensemble
from lightkit.tasks.classification import ClassificationTask
from lightkit.tasks.forecast import ForecastTask
from lightkit.tasks.regression import RegressionTask
from lightkit.tasks.task import Task


def ensemble(tasks: Sequence[Task]) -> Task:
    """Returns a task for tests and predictions whose prediction is the mean of the predictions of trained tasks.

    Of classes it averages the probabilities, of forecasts and regressions the values in the units of the data. The
    interval of a forecast is the mean of the lower bounds to the mean of the upper bounds; its coverage is no longer
    that of a conformal interval, so compare ``test/coverage``. Loss and metrics are those of the first task.

    Args:
        tasks: tasks of one class for the same data, at least one. Their weights are shared with the ensemble.

    Raises:
        ConfigError: there is no task, the tasks do not go together, or their class has no ensemble, as language models.
    """
    if not tasks:
        raise ConfigError("an ensemble needs at least one task, got none")
    first = tasks[0]
    for task in tasks[1:]:
        if type(task) is not type(first):
            raise ConfigError(
                f"an ensemble has tasks of one class, got {type(first).__name__} and {type(task).__name__}"
            )
    if isinstance(first, ClassificationTask):
        made: Task = ClassificationTask(
            Ensemble(task.model for task in tasks), loss=first.loss, metrics=_metrics(first)
        )
    elif isinstance(first, ForecastTask):
        made = _ForecastEnsemble(cast("Sequence[ForecastTask]", tasks))
    elif isinstance(first, RegressionTask):
        made = _RegressionEnsemble(cast("Sequence[RegressionTask]", tasks))
    else:
        raise ConfigError(
            f"there is no ensemble of {type(first).__name__}: only classes, forecasts and regressions have a mean"
        )
    return cast("Task", made.eval())


class _ForecastEnsemble(ForecastTask):
    """The mean of forecasts, each in the units of the series by the center and the scale of its own task."""

    def __init__(self, tasks: Sequence[ForecastTask]) -> None:
        first = tasks[0]
        for name in ("horizon", "relative", "level"):
            _check_same(name, tasks)
        options = {"horizon": first.horizon, "relative": first.relative, "level": first.level}
        super().__init__(nn.ModuleList(tasks), loss=first.loss, metrics=_metrics(first), **options)
        _average_buffers(self, tasks, "center", "scale", "half_width")

    def forward(self, history: Tensor) -> Tensor:
        """Returns the mean forecast, float64 ``(N, horizon)``, in the units of the series."""
        return _mean_of(self.model, history)

    def _forecast(self, history: Tensor, base: Tensor) -> Tensor:
        return self._standardised(self(history), base)


class _RegressionEnsemble(RegressionTask):
    """The mean of predictions, each in the units of the targets by the center and the scale of its own task."""

    def __init__(self, tasks: Sequence[RegressionTask]) -> None:
        first = tasks[0]
        _check_same("num_targets", tasks)
        super().__init__(nn.ModuleList(tasks), num_targets=first.num_targets, loss=first.loss, metrics=_metrics(first))
        _average_buffers(self, tasks, "center", "scale")

    def _standardised_prediction(self, inputs: Sequence[Tensor]) -> Tensor:
        return (_mean_of(self.model, *inputs) - self.center) / self.scale


def _metrics(task: Task) -> dict[str, Any]:
    """Returns copies of the metrics of a task by name, as new as those of a new task."""
    metrics = task.test_metrics.clone()
    metrics.reset()
    return dict(metrics.items(keep_base=True))


def _mean_of(tasks: nn.Module, *inputs: Tensor) -> Tensor:
    return torch.stack([task(*inputs) for task in cast("nn.ModuleList", tasks)]).mean(dim=0)


def _average_buffers(task: Task, tasks: Sequence[Task], *names: str) -> None:
    """Sets buffers of a task to the means of those of other tasks."""
    for name in names:
        getattr(task, name).copy_(torch.stack([getattr(member, name) for member in tasks]).mean(dim=0))


def _check_same(name: str, tasks: Sequence[Task]) -> None:
    values = [getattr(task, name) for task in tasks]
    if different := [value for value in values if value != values[0]]:
        raise ConfigError(f"the tasks of an ensemble must have the same {name}, got {values[0]} and {different[0]}")
