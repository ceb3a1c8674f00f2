"""What keeps a run from taking lean steps: everything that could make Lightning's step another one."""

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
    logger_connector,
    training_step_takes_iterator,
    validates_by_time,
)
from lightkit._lightning.module import is_compiled
from lightkit._lightning.step import RELEASES, STEP_FUNCTIONS
from lightkit._util.strategy_traits import traits_of
from lightkit.loops.hooks import is_implemented

# Lightning's strategies whose part in a step is known; others declare it by `StrategyTraits`. By type: one
# derived from them may do anything.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)

# What a module may override to take over a part of the step, instead of watching it.
_TAKEN_OVER = ("on_train_batch_start", "optimizer_step", "optimizer_zero_grad", "backward")


def obstacle(trainer: pl.Trainer) -> str | None:
    """Why this run cannot take lean steps, or None. To be asked in ``on_train_start``: all is set up then."""
    module = trainer.lightning_module
    loop = trainer.fit_loop.epoch_loop
    if not pl.__version__.startswith(RELEASES):
        return f"Lightning is {pl.__version__}; its loop is known of {', '.join(v + 'x' for v in RELEASES)} alone"
    if not STEP_FUNCTIONS.are_in_place():
        return f"{STEP_FUNCTIONS.first_replaced()} of Lightning has been replaced"
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
    if type(loop) is not TrainingEpochLoop:
        return f"the training loop is {type(loop).__name__}, which may do something else"
    for part in (
        loop,
        loop.automatic_optimization,
        trainer.strategy,
        trainer.precision_plugin,
        logger_connector(trainer),
    ):
        if (name := _own_method(part)) is not None:
            return f"{type(part).__name__} has a method {name} of its own"
    if type(loop.automatic_optimization) is not AutomaticOptimization:
        return f"the optimization loop is {type(loop.automatic_optimization).__name__}, which may do something else"
    if training_step_takes_iterator(trainer):
        return "training_step takes dataloader_iter"
    if trainer.num_training_batches == float("inf"):
        return "how many batches an epoch has is known only at its end"
    if validates_by_time(trainer):
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
    if is_compiled(module):
        return "the LightningModule itself is compiled; compile the model in it"
    return None


def _strategy_obstacle(strategy: Strategy, module: pl.LightningModule) -> str | None:
    if type(strategy) not in _STRATEGIES and not traits_of(strategy).supports_lean_loop:
        known = ", ".join(cls.__name__ for cls in _STRATEGIES)
        return (
            f"the strategy is {type(strategy).__name__}; what one does in a step is known of {known} "
            "and of those in lightkit.strategies"
        )
    if averages_model(strategy):
        return "the strategy averages the model (model_averaging_period)"
    model = strategy.model
    if model is not module and not (type(model) is DistributedDataParallel and model.module is module):
        return "the module is wrapped"
    return None


def _precision_obstacle(plugin: Precision) -> str | None:
    cls = type(plugin)
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return "a GradScaler decides which steps are taken (precision 16-mixed)"
    changed = [
        n for n in PRECISION_METHODS if getattr(cls, n) not in (getattr(Precision, n), getattr(MixedPrecision, n))
    ]
    return f"the precision plug-in {cls.__name__} has its own {changed[0]}" if changed else None
