"""The functions of Lightning that make up a training step, and whether they are still Lightning's own."""

from __future__ import annotations

import types

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer import call

from lightkit._lightning.loops import AutomaticOptimization, TrainingEpochLoop
from lightkit._lightning.metrics import LoggerConnector, ResultCollection, ResultMetric
from lightkit._util.originals import Originals

# The releases whose step `lightkit.loops.step.LeanStep` repeats: the step is no public interface.
RELEASES = ("2.6.",)

_ROOTS = types.SimpleNamespace(
    call=call,
    loop=TrainingEpochLoop,
    automatic=AutomaticOptimization,
    closure=Closure,
    module=pl.LightningModule,
    callback=pl.Callback,
    optimizer=LightningOptimizer,
    strategy=Strategy,
    single=SingleDeviceStrategy,
    ddp=DDPStrategy,
    precision=Precision,
    connector=LoggerConnector,
    results=ResultCollection,
    metric=ResultMetric,
)
_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
_CALLED = {
    "call": ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook"),
    "loop": ("run", "advance", "on_advance_end"),
    "automatic": ("run", "_make_closure", "_optimizer_step", "_training_step"),
    "closure": ("closure", "__call__"),
    "module": ("optimizer_step", "optimizer_zero_grad", "backward", "log", *_HOOKS),
    "callback": _HOOKS,
    "optimizer": ("step",),
    "strategy": ("backward", "optimizer_step", "training_step", "batch_to_device"),
    "single": ("backward", "optimizer_step"),
    "ddp": ("backward", "optimizer_step"),
    "precision": ("backward", "optimizer_step", "_wrap_closure", "convert_input"),
    "connector": ("on_batch_start", "on_batch_end", "update_train_step_metrics", "log_metrics"),
    "results": ("log",),
    "metric": ("update",),
}

# The functions of Lightning that `lightkit.loops.step.LeanStep` leaves out or replaces.
STEP_FUNCTIONS = Originals(
    (lightning, torch), _ROOTS, *(f"{root}.{name}" for root, names in _CALLED.items() for name in names)
)
