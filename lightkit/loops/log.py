"""Logging without what is the same at every call, and without writing to the disk at each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from torch import Tensor

from lightkit._lightning.loops import BATCHES_THAT_STEPPED, logger_connector, should_accumulate
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
from lightkit.loops.deferred import DeferredMetric, defer, settle

_PLAIN = (bool, int, str, type(None))

_LOG = pl.LightningModule.log

# Of ``log``, between the value and the batch size.
_ARGUMENTS = 9

# Seconds after which what the loggers have is on the disk.
_SAVE = 1.0


class FastLog:
    """Takes the place of a module's ``log`` between two of Lightning's own steps.

    Lightning's own checks the arguments, makes a record of them and compares it with the one there is, at every
    call. Here that is done at the first one; one that follows with the same options and a scalar tensor goes
    straight to the running value, by Lightning's own arithmetic, of numbers on a CPU when somebody looks (see
    `DeferredMetric`). Anything else is Lightning's as before.
    """

    def __init__(self, module: pl.LightningModule, results: ResultCollection) -> None:
        self._module = module
        self._attributes = vars(module)
        self._results = results
        self._extract_batch_size = extract_batch_size_of(results)
        self._connector = vars(logger_connector(module.trainer))
        # By hook and name: the options it was logged with, the running value, and where that lies.
        self._known: dict[tuple[str, str], tuple[tuple, dict[str, Any], ResultMetric, torch.device]] = {}

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """See ``LightningModule.log``."""
        hook = self._attributes[CURRENT_HOOK]
        batch_size = options.pop("batch_size", None)
        known = self._known.get((hook, name))
        if (
            known is not None
            and type(value) is Tensor
            and value.dim() == 0
            and known[0] == args
            and known[1] == options
            and not torch.compiler.is_compiling()
            and value.device == known[3]
            and pl.LightningModule.log is _LOG
        ):
            metric = known[2]
            size = self._extract_batch_size(metric, batch_size, metric.meta)
            if type(metric) is DeferredMetric and metric.can_wait(value, size):
                metric.wait(value.item(), size)
            else:
                # What torchmetrics does around an update.
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

    def __reduce__(self) -> tuple:
        # For modules that make copies of themselves in a way of their own: they log as any module does.
        return getattr, (self._module, "log")

    def _remember(self, hook: str, name: str, args: tuple, options: dict[str, Any]) -> None:
        metric = self._results.get(f"{hook}.{name}")
        # With a batch size among them, which is another one each time, they are too many.
        plain = all(isinstance(o, _PLAIN) for o in (*args, *options.values())) and len(args) <= _ARGUMENTS
        if metric is not None and metric.is_tensor and plain and not metric.meta.enable_graph:
            self._known[hook, name] = (args, options, metric, metric.value.device)
            if type(metric) is ResultMetric and DeferredMetric.fits(metric):
                defer(metric)
            elif type(metric) is DeferredMetric and not DeferredMetric.fits(metric):
                settle(metric)

    def close(self) -> None:
        """Leaves Lightning's running values as Lightning would have them."""
        for metric in {id(known[2]): known[2] for known in self._known.values()}.values():
            if type(metric) is DeferredMetric:
                settle(metric)


@contextmanager
def fast_log(module: pl.LightningModule, results: ResultCollection) -> Iterator[None]:
    """Within this context the module logs by `FastLog`, if its ``log`` is Lightning's."""
    own = type(module).log is not pl.LightningModule.log or "log" in vars(module)
    # A compiled module would trace it; Lightning's own steps out of the graph.
    if own or module.trainer.barebones or is_compiled(module):
        yield
        return
    log = FastLog(module, results)
    stand_in = StandIn(module, "log", log)
    try:
        yield
    finally:
        stand_in.undo()
        log.close()


class ShownMetrics:
    """Keeps what the trainer's metrics show at the end of a step, for the case that the next one fails.

    Lightning collects the metrics at the end of each step, and a step that fails leaves those of the step before. Here
    they are collected when somebody looks, so that the running values may have gone on when an error comes.
    """

    def __init__(self, results: ResultCollection) -> None:
        self._results = results
        self._shown: list[tuple[str, Any]] = []

    def note(self) -> None:
        """Keeps what is shown now."""
        self._shown = [
            (key, metric.last() if type(metric) is DeferredMetric else vars(metric)[FORWARD_VALUE])
            for key, metric in self._results.items()
            if metric.meta.on_step
        ]

    def collect(self, connector: LoggerConnector) -> None:
        """Has the connector show what was kept, where nobody has looked at a later value."""
        caches = {key: torch.tensor(value) if isinstance(value, float) else value for key, value in self._shown}
        now = self._results.metrics(on_step=True)
        shown = metrics_of_step(self._results, caches)
        for kind, collected in collected_metrics(connector).items():
            for name, value in shown[kind].items():
                if name not in collected or not _is_same(collected[name], now[kind].get(name)):
                    collected[name] = value


def _is_same(value: Any, other: Any) -> bool:
    """Returns True if two metrics were collected from one running value at one time."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return value == other


class StepLogger:
    """Hands the metrics of a step to the loggers, as ``_LoggerConnector.update_train_step_metrics`` does.

    Lightning has every logger write its files at each of these. Here they do so once a second, and by `save`.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._connector = logger_connector(trainer)
        self._loop = vars(trainer.fit_loop.epoch_loop)
        self._should_accumulate = should_accumulate(trainer)
        self._saved = time.monotonic()
        self._unsaved = False

    def __call__(self) -> None:
        """Logs if this step is one that is to be logged."""
        trainer = self._trainer
        every = trainer.log_every_n_steps
        # As the connector counts them, which has to find out which loop is running.
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
        self._unsaved = True
        if time.monotonic() - self._saved > _SAVE:
            self.save()

    def save(self) -> None:
        """Has the loggers write what they have not written yet."""
        if self._unsaved:
            for logger in self._trainer.loggers:
                logger.save()
            self._unsaved, self._saved = False, time.monotonic()
