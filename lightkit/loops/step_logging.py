"""Logging of a step that checks the options of ``log`` once, and writes the loggers' files once a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from torch import Tensor

from lightkit._lightning.loops import BATCHES_THAT_STEPPED, connected, logger_connector, should_accumulate
from lightkit._lightning.metrics import (
    COMPUTED,
    CONNECTOR_HOOK,
    FORWARD_VALUE,
    UPDATE_COUNT,
    LoggerConnector,
    ResultCollection,
    ResultMetric,
    collected_metrics,
    extract_batch_size_of,
    logged_metrics,
    metrics_of_step,
)
from lightkit._lightning.module import CURRENT_HOOK, is_compiled
from lightkit._util.stand_in import StandIn
from lightkit.loops.lazy_metrics import LazyMetric, make_eager, make_lazy

_PLAIN = (bool, int, str, type(None))

_LOG = pl.LightningModule.log

# The positional parameters of ``log`` between the value and the batch size.
_MAX_POSITIONAL = 9

# Seconds between two writes of the loggers' files.
_SAVE_INTERVAL = 1.0


class FastLog:
    """Replaces a module's ``log`` during lean steps.

    At every call Lightning checks the arguments, makes a record of them and compares the record with the previous one.
    `FastLog` hands the first call with a name to Lightning. A later call with the same name, the same options and a
    scalar tensor updates the running value directly, by Lightning's own arithmetic; on a CPU the running value is a
    `LazyMetric`. `FastLog` hands all other calls to Lightning.

    Args:
        module: the module in a fit.
        results: Lightning's running values of the training epoch.
    """

    def __init__(self, module: pl.LightningModule, results: ResultCollection) -> None:
        self._module = module
        self._attributes = vars(module)
        self._results = results
        self._extract_batch_size = extract_batch_size_of(results)
        self._connector = vars(logger_connector(module.trainer))
        # By hook and name: the arguments and options of the previous call, the running value and its device.
        self._cached: dict[tuple[str, str], tuple[tuple[Any, ...], dict[str, Any], ResultMetric, torch.device]] = {}

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """See ``LightningModule.log``."""
        hook = self._attributes[CURRENT_HOOK]
        batch_size = options.pop("batch_size", None)
        cached = self._cached.get((hook, name))
        if (
            cached is not None
            and type(value) is Tensor
            and value.dim() == 0
            and cached[0] == args
            and cached[1] == options
            and not torch.compiler.is_compiling()
            and value.device == cached[3]
            and pl.LightningModule.log is _LOG
        ):
            metric = cached[2]
            size = self._extract_batch_size(metric, batch_size, metric.meta)
            if type(metric) is LazyMetric and metric.can_append(value, size):
                metric.append(value.item(), size)
            else:
                # torchmetrics does this around an update.
                attributes = vars(metric)
                attributes[COMPUTED] = None
                attributes[UPDATE_COUNT] += 1
                ResultMetric.update(metric, value.detach(), size)
                metric.has_reset = False
            self._connector[CONNECTOR_HOOK] = hook
            return
        if batch_size is not None:
            options["batch_size"] = batch_size
        type(self._module).log(self._module, name, value, *args, **options)
        options.pop("batch_size", None)
        self._remember(hook, name, args, options)

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that copies itself in its own way may copy this object: the copy logs like any module.
        return getattr, (self._module, "log")

    def _remember(self, hook: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        metric = self._results.get(f"{hook}.{name}")
        # A batch size among the positional arguments differs from call to call: the cache would grow without end.
        is_plain = all(isinstance(o, _PLAIN) for o in (*args, *options.values())) and len(args) <= _MAX_POSITIONAL
        if metric is not None and metric.is_tensor and is_plain and not metric.meta.enable_graph:
            self._cached[hook, name] = (args, options, metric, metric.value.device)
            if type(metric) is ResultMetric and LazyMetric.supports(metric):
                make_lazy(metric)
            elif type(metric) is LazyMetric and not LazyMetric.supports(metric):
                make_eager(metric)

    def close(self) -> None:
        """Turns each `LazyMetric` into Lightning's metric again."""
        for metric in {id(cached[2]): cached[2] for cached in self._cached.values()}.values():
            if type(metric) is LazyMetric:
                make_eager(metric)


@contextmanager
def fast_log(module: pl.LightningModule, results: ResultCollection) -> Iterator[None]:
    """Replaces the ``log`` of a module by `FastLog` within the context.

    The module keeps its ``log`` if that is not Lightning's, if the trainer is barebones, or under torch.compile.
    """
    has_own_log = type(module).log is not pl.LightningModule.log or "log" in vars(module)
    # torch.compile would trace FastLog in a compiled module; Lightning's log breaks the graph.
    if has_own_log or module.trainer.barebones or is_compiled(module):
        yield
        return
    log = FastLog(module, results)
    stand_in = StandIn(module, "log", log)
    try:
        yield
    finally:
        stand_in.undo()
        log.close()


class StepMetrics:
    """A record of the metrics of the last complete step; `restore` gives them to the trainer if the next step fails.

    Lightning collects the metrics at the end of each step, so that after an error the trainer has the metrics of the
    last complete step. A lean step does not collect them, and the running values may already contain values of the step
    that failed. `LeanStep` therefore calls `record` at the end of each step, and `restore` after an error.

    Args:
        results: Lightning's running values of the training epoch.
    """

    def __init__(self, results: ResultCollection) -> None:
        self._results = results
        self._values: list[tuple[str, Any]] = []

    def record(self) -> None:
        """Records the values that the module logged in the step that has just ended."""
        self._values = [
            (key, metric.last_value() if type(metric) is LazyMetric else vars(metric)[FORWARD_VALUE])
            for key, metric in self._results.items()
            if metric.meta.on_step
        ]

    def restore(self, connector: LoggerConnector) -> None:
        """Puts the recorded metrics into the trainer's metrics.

        A metric that was read, and thereby collected, after `record` stays as it is.

        Args:
            connector: the part of the trainer that collects metrics.
        """
        values = {key: torch.tensor(value) if isinstance(value, float) else value for key, value in self._values}
        now = self._results.metrics(on_step=True)
        recorded = metrics_of_step(self._results, values)
        for kind, collected in collected_metrics(connector).items():
            for name, value in recorded[kind].items():
                if name not in collected or not _have_same_source(collected[name], now[kind].get(name)):
                    collected[name] = value


def _have_same_source(value: Any, other: Any) -> bool:
    """Returns True if two metrics were collected from the same state of one running value."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return value == other


class StepLogger:
    """Hands the metrics of a step to the loggers, as ``_LoggerConnector.update_train_step_metrics`` does.

    Lightning makes every logger write its files each time. This class makes the loggers write once a second, and in
    `save`.

    Args:
        trainer: a trainer in a fit.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = connected(trainer)
        self._connector = logger_connector(trainer)
        self._loop = vars(trainer.fit_loop.epoch_loop)
        self._should_accumulate = should_accumulate(trainer)
        self._saved = time.monotonic()
        self._has_unsaved = False

    def __call__(self) -> None:
        """Hands the metrics to the loggers in every ``log_every_n_steps``-th step."""
        trainer = self._trainer
        every = trainer.log_every_n_steps
        # The connector counts in the same way, except that it first looks for the loop that is running.
        if every == 0 or ((self._loop[BATCHES_THAT_STEPPED] + 1) % every != 0 and not trainer.should_stop):
            return
        if self._should_accumulate():
            return
        metrics = self._connector.metrics["log"]
        if not trainer.loggers or not metrics:
            return
        logged_metrics(self._connector).update(metrics)
        values = convert_tensors_to_scalars(metrics)
        step = values.pop("step", None)
        if step is None:
            values.setdefault("epoch", trainer.current_epoch)
            step = self._loop[BATCHES_THAT_STEPPED]
        for logger in trainer.loggers:
            logger.log_metrics(metrics=values, step=int(step))
        self._has_unsaved = True
        if time.monotonic() - self._saved > _SAVE_INTERVAL:
            self.save()

    def save(self) -> None:
        """Makes the loggers write the metrics that they have not written yet."""
        if self._has_unsaved:
            for logger in self._trainer.loggers:
                logger.save()
            self._has_unsaved, self._saved = False, time.monotonic()
