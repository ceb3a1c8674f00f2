"""The reasons why a fit cannot take lean steps or run its passes from CUDA graphs."""

from __future__ import annotations

import types

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lightkit._lightning.loops import (
    PRECISION_METHODS,
    AutomaticOptimization,
    TrainingEpochLoop,
    averages_model,
    connected,
    logger_connector,
    training_step_takes_iterator,
    validates_by_time,
)
from lightkit._lightning.module import is_compiled
from lightkit._lightning.step import RELEASES, STEP_FUNCTIONS
from lightkit._util.strategy_traits import traits_of
from lightkit.loops.hooks import is_overridden

# Lightning's strategies whose part in a step is known; others declare it by `StrategyTraits`. Subclasses may change any
# part, so that types are compared, not instances.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)

# The methods by which a module replaces a part of the step instead of observing it.
_REPLACING_METHODS = ("on_train_batch_start", "optimizer_step", "optimizer_zero_grad", "backward")


def unsupported_reason(trainer: pl.Trainer) -> str | None:
    """Returns the reason why the fit of a trainer cannot take lean steps, or None if it can.

    A lean step is a training step of `lightkit.loops.LeanRun`, which computes the same as Lightning's step with less
    work in Python. Call the function in ``on_train_start``, when the trainer, the module and the data loaders are set
    up.
    """
    module = trainer.lightning_module
    loop = trainer.fit_loop.epoch_loop
    if not pl.__version__.startswith(RELEASES):
        return f"Lightning is {pl.__version__}; its loop is known of {', '.join(v + 'x' for v in RELEASES)} alone"
    if not STEP_FUNCTIONS.are_in_place():
        return f"{STEP_FUNCTIONS.first_replaced()} of Lightning has been replaced"
    if not module.automatic_optimization:
        return "the module optimizes manually (automatic_optimization is False)"
    if (reason := _strategy_reason(trainer.strategy, module)) is not None:
        return reason
    profiler = connected(trainer).profiler
    if not isinstance(profiler, PassThroughProfiler):
        return f"{type(profiler).__name__} measures every part of Lightning's own step"
    for name in _REPLACING_METHODS:
        if is_overridden(name, module, pl.LightningModule):
            return f"{type(module).__name__}.{name} takes over a part of the step"
    if (reason := _precision_reason(trainer.precision_plugin)) is not None:
        return reason
    if type(loop) is not TrainingEpochLoop:
        return f"the training loop is {type(loop).__name__}, which may do something else"
    for part in (
        loop,
        loop.automatic_optimization,
        trainer.strategy,
        trainer.precision_plugin,
        logger_connector(trainer),
    ):
        if (name := _instance_method(part)) is not None:
            return f"{type(part).__name__} has a method {name} of its own"
    if type(loop.automatic_optimization) is not AutomaticOptimization:
        return f"the optimization loop is {type(loop.automatic_optimization).__name__}, which may do something else"
    if training_step_takes_iterator(trainer):
        return "training_step takes dataloader_iter"
    if trainer.num_training_batches == float("inf"):
        return "the number of batches of an epoch is known only at its end"
    if validates_by_time(trainer):
        return "validation comes by the clock (val_check_interval is a time)"
    return None


def graph_unsupported_reason(trainer: pl.Trainer) -> str | None:
    """Returns the reason why a fit with lean steps on a GPU cannot run its passes from CUDA graphs, or None.

    The passes are the forward and the backward pass of a step. `PassGraphs` finds further reasons during the fit.
    """
    module = trainer.lightning_module
    if trainer.world_size > 1:
        return "there are several processes"
    if trainer.accumulate_grad_batches != 1:
        return "gradients are accumulated (accumulate_grad_batches)"
    if trainer.barebones:
        return "the trainer is barebones"
    if type(module).log is not pl.LightningModule.log or "log" in vars(module):
        return f"{type(module).__name__} has a log of its own"
    if is_compiled(module):
        return "the LightningModule itself is compiled; compile the model in it"
    return None


def _instance_method(part: object) -> str | None:
    """Returns the name of an attribute of ``part`` that replaces a method of its class, or None."""
    cls = type(part)
    return next((name for name in vars(part) if isinstance(getattr(cls, name, None), types.FunctionType)), None)


def _strategy_reason(strategy: Strategy, module: pl.LightningModule) -> str | None:
    if type(strategy) not in _STRATEGIES and not traits_of(strategy).supports_lean_loop:
        known = ", ".join(cls.__name__ for cls in _STRATEGIES)
        return (
            f"the strategy is {type(strategy).__name__}; lean steps know {known} and the strategies of "
            "lightkit.strategies"
        )
    if averages_model(strategy):
        return "the strategy averages the model (model_averaging_period)"
    model = strategy.model
    if model is not module and not (type(model) is DistributedDataParallel and model.module is module):
        return "the module is wrapped"
    return None


def _precision_reason(plugin: Precision) -> str | None:
    cls = type(plugin)
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return "a GradScaler decides which steps are taken (precision 16-mixed)"
    for name in PRECISION_METHODS:
        if getattr(cls, name) not in (getattr(Precision, name), getattr(MixedPrecision, name)):
            return f"the precision plug-in {cls.__name__} has its own {name}"
    return None
