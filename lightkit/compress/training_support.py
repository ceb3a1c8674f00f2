"""What the callbacks of compression ask of a training, and change in its other callbacks."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from lightkit._lightning.module import is_compiled
from lightkit._util.strategy_traits import LocalTrainer, WeightServers, traits_of
from lightkit.capture.module_call import is_captured
from lightkit.errors import ConfigError

# The kinds of strategies by where the weights are: the same in each process; the same after each average; a part in
# each process; on servers.
WHOLE, LOCAL, SHARDED = frozenset({"whole"}), frozenset({"local"}), frozenset({"sharded"})
SERVED = frozenset({"served"})
_STRATEGIES = {
    "whole": "one device, ddp and DataParallel",
    "local": "LocalSGD and DiLoCo",
    "sharded": "ModelParallelStrategy",
    "served": "ParameterServer",
}


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Returns the callbacks of a trainer."""
    # Lightning sets Trainer.callbacks in a connector, where a type checker does not see it.
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def check_training(
    name: str,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    kinds: frozenset[str] = WHOLE,
    models: str = "of several sizes",
) -> None:
    """Rejects a training in which a callback cannot change the weights, before its first step.

    Args:
        name: the name of the callback, for the message.
        trainer: the trainer, with its optimizers.
        pl_module: the module.
        kinds: the kinds of strategies that the callback supports, such as ``WHOLE | LOCAL``.
        models: what tells the models before and after a round apart, for the message.

    Raises:
        ConfigError: the strategy is of another kind; the module optimizes manually or has several optimizers; or a
            callback averages weights from before.
    """
    strategy = trainer.strategy
    if _kind_of(strategy) not in kinds:
        known = " and ".join(text for kind, text in _STRATEGIES.items() if kind in kinds)
        raise ConfigError(f"{name} does not go with {type(strategy).__name__}; it goes with {known}")
    if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ConfigError(f"{name} needs automatic optimization with one optimizer")
    averaging = next(
        (c for c in callbacks_of(trainer) if isinstance(c, (WeightAveraging, StochasticWeightAveraging))), None
    )
    if averaging is not None:
        raise ConfigError(f"{name}: {type(averaging).__name__} would average the weights of models {models}")


def _kind_of(strategy: Strategy) -> str:
    traits = traits_of(strategy)
    if isinstance(strategy, WeightServers):
        return "served"
    if traits.trains_locally:
        return "local"
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        return "whole"
    return "sharded" if isinstance(strategy, ModelParallelStrategy) else "other"


def check_not_compiled(name: str, pl_module: pl.LightningModule) -> None:
    """Rejects a module under torch.compile, whose code is that of the widths at compilation."""
    for part, module in pl_module.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None and not is_captured(module)
        if compiled or is_compiled(module):
            raise ConfigError(f"{name}: {part or 'the module'} is compiled for the widths that it has")


def decide_together(trainer: pl.Trainer, decision: bool) -> bool:
    """Returns what a callback decides after a step of the optimizer, in all processes alike.

    Where processes train by themselves, the decision is that of process 0, since processes with other numbers of
    batches count other steps; and False unless they have just averaged their weights.

    Args:
        trainer: the trainer; all its processes call the function after each step of theirs.
        decision: the decision of this process.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, LocalTrainer):
        return decision
    return strategy.has_common_weights and bool(strategy.broadcast(decision))


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all processes by rank; all of them must call the function. Without others, one value."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def training_steps(name: str, trainer: pl.Trainer) -> int:
    """Returns the number of optimizer steps of a training.

    Raises:
        ConfigError: the training has no limit of steps or epochs, or its data have no length.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps) or steps < 1:
        # The number of steps of an epoch is unknown if the data have no length.
        limits = "max_steps" if math.isinf(trainer.num_training_batches) else "max_epochs or max_steps"
        raise ConfigError(f"{name} needs the length of the training: set {limits}")
    return int(steps)


def round_steps(name: str, start: float, end: float, rounds: int, total: int) -> list[int]:
    """Returns the numbers of finished steps at which the rounds of a callback come, in order and all different.

    Args:
        name: the name of the callback, for the message.
        start: the share of the steps before the first round.
        end: the share of the steps before the last round.
        rounds: the number of rounds.
        total: the number of steps of the training.

    Raises:
        ConfigError: the training is too short, or the last round comes with its last step.
    """
    span = (end - start) / max(1, rounds - 1)
    steps: list[int] = []
    for index in range(rounds):
        # Each round needs a step before it, and the last one a step after it.
        steps.append(max(round(total * (start + span * index)), steps[-1] + 1 if steps else 1))
    if rounds < total <= min(steps[-1], round(total * end)):
        # Steps are rounded: an end that is less than half a step below 1 comes with the last step.
        raise ConfigError(
            f"{name}: end={end} leaves none of the {total} steps of the training after the last round; end must be "
            f"below {int(1000 - 500 / total) / 1000}"
        )
    if steps[-1] >= total:
        raise ConfigError(f"{name}: {rounds} rounds need more than the {total} steps of the training")
    return steps


def check_share(name: str, value: Any, *, zero: bool = True) -> float:
    """Returns ``value`` as a float if it is a number from 0 to 1.

    Args:
        name: the name of the argument.
        value: its value.
        zero: True if 0 is allowed.

    Raises:
        ConfigError: ``value`` is none.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (value == 0 and not zero):
        raise ConfigError(f"{name} must be a number {'from 0' if zero else 'above 0'} to 1, got {value!r}")
    return float(value)


def forget_best(trainer: pl.Trainer) -> None:
    """Makes checkpoints and early stopping compare from now on: the scores so far are those of larger models."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_score = callback.current_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
