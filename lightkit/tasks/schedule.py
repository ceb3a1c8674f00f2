"""Learning-rate schedules: their interval, their metric, and a length that is the length of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightkit._util.scheduler_calls import count_calls
from lightkit.errors import ConfigError

# The arguments by which schedulers of torch take the length of the schedule.
LENGTH_ARGUMENTS = ("T_max", "total_steps", "total_iters")

# The argument of OneCycleLR that is a learning rate.
RATE_ARGUMENT = "max_lr"

INTERVALS = ("epoch", "step")

# A scheduler with this argument changes the learning rate in every step.
_PER_STEP_ARGUMENT = "total_steps"

_DEFAULT_MONITOR = "val/loss"


@dataclass(frozen=True)
class Schedule:
    """A scheduler factory, and the times at which Lightning calls the scheduler.

    An instance is a factory itself: ``ClassificationTask(..., scheduler=Schedule(partial(StepLR, step_size=100),
    interval="step"))``.

    Args:
        make: a function that returns a scheduler of the given optimizer.
        interval: ``"epoch"`` or ``"step"``: the scheduler is called after epochs or after optimizer steps. None: after
            epochs, except where `make_schedule` gives the schedule a length in steps.
        frequency: the scheduler is called once in this number of epochs or steps. Within an epoch Lightning counts the
            batches from the start of the epoch.
        monitor: the metric that a ReduceLROnPlateau reads.

    Raises:
        ConfigError: ``interval``, ``frequency`` or ``monitor`` is no such value.
    """

    make: Callable[..., Any]
    interval: str | None = None
    frequency: int = 1
    monitor: str = _DEFAULT_MONITOR

    def __post_init__(self) -> None:
        if self.interval not in (None, *INTERVALS):
            raise ConfigError(f"scheduler.interval must be epoch or step, got {self.interval!r}")
        if type(self.frequency) is not int or self.frequency < 1:
            raise ConfigError(f"scheduler.frequency must be a whole number from 1, got {self.frequency!r}")
        if type(self.monitor) is not str or not self.monitor:
            raise ConfigError(f"scheduler.monitor must be the name of a metric, got {self.monitor!r}")

    def __call__(self, optimizer: Optimizer) -> LRScheduler:
        """Returns the scheduler of ``optimizer``; the length arguments of ``make`` must have values."""
        return with_rate(self.make, optimizer)(optimizer)


def open_length_arguments(make: Callable[..., Any]) -> list[str]:
    """Returns the names of the length arguments that a scheduler factory sets to None.

    Args:
        make: a function that returns a scheduler of an optimizer; a :class:`functools.partial` may set arguments.
    """
    keywords = _keywords(make)
    # OneCycleLR may compute its length from these two.
    if {"epochs", "steps_per_epoch"} <= {name for name, value in keywords.items() if value is not None}:
        return []
    return [name for name in LENGTH_ARGUMENTS if name in keywords and keywords[name] is None]


def with_length(make: Callable[..., Any], length: int) -> Callable[..., Any]:
    """Returns a scheduler factory whose length arguments are ``length`` where ``make`` sets them to None."""
    names = open_length_arguments(make)
    return partial(_inner(make), **dict.fromkeys(names, length)) if names else make


def with_rate(make: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
    """Returns a scheduler factory whose ``max_lr`` is the optimizer's learning rate if ``make`` sets it to None."""
    keywords = _keywords(make)
    if RATE_ARGUMENT not in keywords or keywords[RATE_ARGUMENT] is not None:
        return make
    return partial(_inner(make), **{RATE_ARGUMENT: [float(group["lr"]) for group in optimizer.param_groups]})


def make_schedule(
    make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer, find_trainer: Callable[[], pl.Trainer]
) -> LRSchedulerConfigType:
    """Returns the entry of ``configure_optimizers`` for the scheduler of an optimizer.

    If ``make`` sets an argument ``T_max``, ``total_steps`` or ``total_iters`` to None, the argument becomes the length
    of the training, counted in calls of the scheduler. Unless ``make`` is a `Schedule` with an interval, these are
    epochs, or steps if ``max_steps`` ends the training or the argument is ``total_steps``. An argument ``max_lr`` that
    is None becomes the learning rate of the optimizer.

    Args:
        make: a function that returns a scheduler of the given optimizer, or a `Schedule`.
        optimizer: the optimizer.
        find_trainer: a function that returns the trainer, which the function calls only if it needs the length.

    Raises:
        ConfigError: the scheduler needs the length of the training, and the trainer has no limit of epochs or steps.
    """
    schedule = make if isinstance(make, Schedule) else Schedule(make)
    interval, factory = schedule.interval, schedule.make
    if names := open_length_arguments(factory):
        interval, length = _training_length(find_trainer(), names, schedule)
        factory = with_length(factory, length)
    scheduler = with_rate(factory, optimizer)(optimizer)
    entry: LRSchedulerConfigType = {
        "scheduler": scheduler,
        "interval": interval or "epoch",
        "frequency": schedule.frequency,
    }
    if isinstance(scheduler, ReduceLROnPlateau):
        entry["monitor"] = schedule.monitor
    return entry


def check_limits(names: list[str], max_epochs: int | None, max_steps: int) -> None:
    """Rejects a training without an end for a scheduler that needs the length of the training.

    Args:
        names: the length arguments of the scheduler that are None: see `open_length_arguments`.
        max_epochs: the trainer's limit of epochs; -1 for no limit, None for Lightning's default.
        max_steps: the trainer's limit of steps; -1 for no limit.

    Raises:
        ConfigError: ``names`` is not empty, and there is neither limit.
    """
    if names and max_epochs == -1 and max_steps == -1:
        raise ConfigError(
            f"the scheduler needs the length of the training, and the trainer has no limit of epochs or steps: set "
            f"trainer.max_epochs, trainer.max_steps or scheduler.{names[0]}"
        )


def _training_length(trainer: pl.Trainer, names: list[str], schedule: Schedule) -> tuple[str, int]:
    """Returns the interval of a schedule, ``"epoch"`` or ``"step"``, and the length of the training in its calls."""
    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    check_limits(names, max_epochs, max_steps)
    is_endless = max_epochs is None or max_epochs == -1
    epochs = 0 if max_epochs is None else max_epochs
    interval, frequency = schedule.interval, schedule.frequency
    if is_endless and frequency == 1 and interval != "epoch":
        return "step", max_steps
    if not is_endless and max_steps == -1 and interval != "step" and _PER_STEP_ARGUMENT not in names:
        return "epoch", max(1, epochs // frequency)
    steps = max_steps if is_endless else trainer.estimated_stepping_batches
    if steps == -1 or math.isinf(steps):
        raise ConfigError(
            f"the scheduler needs the number of steps, and the data have no length: set trainer.max_steps or "
            f"scheduler.{names[0]}"
        )
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if is_endless:
        trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
    # With both limits, the first that is reached ends the training.
    ends_by_steps = max_steps != -1 and steps >= max_steps
    if interval is None:
        interval = "step" if ends_by_steps or _PER_STEP_ARGUMENT in names else "epoch"
    if interval == "step":
        return "step", max(1, count_calls(int(steps), frequency, batches, accumulate))
    if is_endless or ends_by_steps:
        epochs = 1 if math.isinf(batches) else math.ceil(steps / math.ceil(batches / accumulate))
    return "epoch", max(1, epochs // frequency)


def _keywords(make: Callable[..., Any]) -> Mapping[str, Any]:
    return getattr(_inner(make), "keywords", {})


def _inner(make: Callable[..., Any]) -> Callable[..., Any]:
    return make.make if isinstance(make, Schedule) else make
