"""What keeps a run from taking lean steps: everything that could make Lightning's step another one."""

from __future__ import annotations

import types

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch.nn.parallel import DistributedDataParallel

from lightkit._util.originals import Originals
from lightkit._util.strategy_traits import traits_of
from lightkit.loops.hooks import is_implemented

# The releases whose loop `LeanRun` was written after, and tested to equal: it is no public interface.
_LIGHTNING = ("2.6.",)

# Lightning's strategies whose part in a step is known; others declare it by `StrategyTraits`. By type: one
# derived from them may do anything.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)

# What a module may override to take over a part of the step, instead of watching it.
_TAKEN_OVER = ("on_train_batch_start", "optimizer_step", "optimizer_zero_grad", "backward")

# What Lightning calls in a step, from lightning.pytorch on, and a lean step leaves out or does in its own way.
_ROOTS = types.SimpleNamespace(
    call=pl.trainer.call,
    loop=_TrainingEpochLoop,
    automatic=_AutomaticOptimization,
    closure=Closure,
    module=pl.LightningModule,
    callback=pl.Callback,
    optimizer=LightningOptimizer,
    strategy=Strategy,
    single=SingleDeviceStrategy,
    ddp=DDPStrategy,
    precision=Precision,
    connector=_LoggerConnector,
    results=_ResultCollection,
    metric=_ResultMetric,
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
ORIGINALS = Originals(
    (lightning, torch), _ROOTS, *(f"{root}.{name}" for root, names in _CALLED.items() for name in names)
)

# The methods through which a precision plug-in takes part in a step.
_PRECISION = ("pre_backward", "backward", "post_backward", "optimizer_step", "_wrap_closure", "_after_closure")


def obstacle(trainer: pl.Trainer) -> str | None:
    """Why this run cannot take lean steps, or None. To be asked in ``on_train_start``: all is set up then."""
    module = trainer.lightning_module
    loop = trainer.fit_loop.epoch_loop
    if not pl.__version__.startswith(_LIGHTNING):
        return f"Lightning is {pl.__version__}; its loop is known of {', '.join(v + 'x' for v in _LIGHTNING)} alone"
    if not ORIGINALS.are_in_place():
        return f"{ORIGINALS.first_replaced()} of Lightning has been replaced"
    if not module.automatic_optimization:
        return "the module optimizes manually (automatic_optimization is False)"
    if (cause := _strategy_obstacle(trainer.strategy, module)) is not None:
        return cause
    if not isinstance(trainer.profiler, PassThroughProfiler):
        return f"{type(trainer.profiler).__name__} measures every part of Lightning's own step"
    for name in _TAKEN_OVER:
        if is_implemented(name, module, pl.LightningModule):
            return f"{type(module).__name__}.{name} takes over a part of the step"
    if (cause := _precision_obstacle(trainer.precision_plugin)) is not None:
        return cause
    if type(loop) is not _TrainingEpochLoop:
        return f"the training loop is {type(loop).__name__}, which may do something else"
    for part in (
        loop,
        loop.automatic_optimization,
        trainer.strategy,
        trainer.precision_plugin,
        trainer._logger_connector,
    ):
        if (name := _own_method(part)) is not None:
            return f"{type(part).__name__} has a method {name} of its own"
    if type(loop.automatic_optimization) is not _AutomaticOptimization:
        return f"the optimization loop is {type(loop.automatic_optimization).__name__}, which may do something else"
    if isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
        return "training_step takes dataloader_iter"
    if trainer.num_training_batches == float("inf"):
        return "how many batches an epoch has is known only at its end"
    if trainer._val_check_time_interval is not None:
        return "validation comes by the clock (val_check_interval is a time)"
    return None


def _own_method(part: object) -> str | None:
    """Returns the name of a method that an object has in place of its class's, or None."""
    cls = type(part)
    return next((name for name in vars(part) if isinstance(getattr(cls, name, None), types.FunctionType)), None)


def graph_obstacle(trainer: pl.Trainer) -> str | None:
    """Why a run with lean steps on a GPU cannot have its passes in CUDA graphs, or None."""
    module = trainer.lightning_module
    if trainer.world_size > 1:
        return "there are several processes"
    if trainer.accumulate_grad_batches != 1:
        return "gradients are accumulated (accumulate_grad_batches)"
    if trainer.barebones:
        return "the trainer is barebones"
    if type(module).log is not pl.LightningModule.log or "log" in vars(module):
        return f"{type(module).__name__} has a log of its own"
    if module._compiler_ctx is not None:
        return "the LightningModule itself is compiled; compile the model in it"
    return None


def _strategy_obstacle(strategy: Strategy, module: pl.LightningModule) -> str | None:
    if type(strategy) not in _STRATEGIES and not traits_of(strategy).supports_lean_loop:
        known = ", ".join(cls.__name__ for cls in _STRATEGIES)
        return (
            f"the strategy is {type(strategy).__name__}; what one does in a step is known of {known} "
            "and of those in lightkit.strategies"
        )
    if getattr(strategy, "_model_averager", None) is not None:
        return "the strategy averages the model (model_averaging_period)"
    model = strategy.model
    if model is not module and not (type(model) is DistributedDataParallel and model.module is module):
        return "the module is wrapped"
    return None


def _precision_obstacle(plugin: Precision) -> str | None:
    cls = type(plugin)
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return "a GradScaler decides which steps are taken (precision 16-mixed)"
    changed = [n for n in _PRECISION if getattr(cls, n) not in (getattr(Precision, n), getattr(MixedPrecision, n))]
    return f"the precision plug-in {cls.__name__} has its own {changed[0]}" if changed else None
