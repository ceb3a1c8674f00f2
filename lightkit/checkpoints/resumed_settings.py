"""Hyperparameters and schedules of the present run, which replace those in the states of a checkpoint.

An optimizer's state dict has the hyperparameters, and a scheduler's state dict has the schedule. torch loads both, so
that a resumed training would ignore what the user has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightkit._util.scheduler_calls import count_calls
from lightkit.errors import CheckpointError

# Entries of a scheduler's state dict that change during a training; the others describe the schedule.
_PROGRESS = {
    *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"),
    *("T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"),
}

# The largest number of steps of a schedule that are repeated: a minute or two.
_MAX_REPEATED_STEPS = 10_000_000


class ResumedSettings(Callback):
    """Applies the hyperparameters and the schedule of the present run to the states that a training resumes from.

    A changed hyperparameter replaces the saved one. If the schedule has changed, or the learning rate, the learning
    rates are those of a training that had the present settings from its first step: a longer cosine schedule is the
    longer one. The patience of an ``EarlyStopping`` is the present one.

    A schedule that depends on the metrics, a ReduceLROnPlateau, keeps its progress; its settings are the present ones.

    Args:
        path: the path of the checkpoint, for messages.
        changed: the names of the changed hyperparameters of the optimizers, such as ``lr``; None for all.
        schedule_changed: True if the scheduler has other arguments than in the checkpoint's run. The callback itself
            compares the schedulers of torch and lightkit, whose length may depend on the trainer.
    """

    def __init__(self, path: str | Path, changed: Collection[str] | None = (), schedule_changed: bool = False) -> None:
        self._path = path
        self._changed = None if changed is None else set(changed)
        self._schedule_changed = schedule_changed
        self._checkpoint: dict[str, Any] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the checkpoint for `on_fit_start`, and sets the patience in the states of ``EarlyStopping``."""
        self._checkpoint = checkpoint
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EarlyStopping) and "patience" in states.get(callback.state_key, {}):
                states[callback.state_key]["patience"] = callback.patience

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the present settings into the checkpoint, before Lightning restores the states.

        Raises:
            CheckpointError: a setting cannot be applied to a saved state.
        """
        checkpoint, self._checkpoint = self._checkpoint, {}
        saved = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(trainer.optimizers, saved, strict=False):
            _apply_hyperparameters(optimizer, state, self._changed)
        configs = trainer.lr_scheduler_configs
        states = checkpoint.get("lr_schedulers")
        if states is None or not self._is_schedule_changed(configs, states):
            return
        known = [*states, *[{}] * (len(configs) - len(states))]
        checkpoint["lr_schedulers"] = [
            self._renewed_state(config, state, _finished_calls(config, checkpoint, trainer))
            for config, state in zip(configs, known, strict=False)
        ]
        for optimizer, state in zip(trainer.optimizers, saved, strict=False):
            schedulers = [config.scheduler for config in configs if config.scheduler.optimizer is optimizer]
            _copy_schedule(optimizer, state, schedulers, self._lr_changed)

    @property
    def _lr_changed(self) -> bool:
        return self._changed is None or "lr" in self._changed

    def _is_schedule_changed(self, configs: list[LRSchedulerConfig], states: list[dict[str, Any]]) -> bool:
        if self._schedule_changed or self._lr_changed or len(configs) != len(states):
            return True
        return any(
            _is_known(config.scheduler) and not _is_equal(_schedule_of(config.scheduler.state_dict()), _schedule_of(s))
            for config, s in zip(configs, states, strict=True)
        )

    def _renewed_state(self, config: LRSchedulerConfig, state: dict[str, Any], count: int) -> dict[str, Any]:
        """Returns the state of the present scheduler after the progress of the checkpoint.

        Args:
            config: the present scheduler.
            state: the saved state; an empty dict if the checkpoint has none.
            count: the number of calls of the present scheduler that the checkpoint's progress stands for.
        """
        scheduler = config.scheduler
        name = type(scheduler).__name__
        if isinstance(scheduler, ReduceLROnPlateau):
            if type(state) is not dict or "num_bad_epochs" not in state:
                raise CheckpointError(
                    f"{self._path} cannot be resumed with {name}: that needs the metrics of the epochs before, and the "
                    "checkpoint is of a training without it"
                )
            return {**scheduler.state_dict(), **{name: state[name] for name in _PROGRESS & state.keys()}}
        if count > _MAX_REPEATED_STEPS:
            raise CheckpointError(
                f"{self._path} cannot be resumed with another schedule: {count:,} steps of {name} would be repeated; "
                f"the limit is {_MAX_REPEATED_STEPS:,}"
            )
        with warnings.catch_warnings():
            # torch expects the optimizer's step before the scheduler's.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            try:
                for _ in range(count):
                    scheduler.step()
            except (ArithmeticError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self._path} cannot be resumed with {name}, whose step {count} fails: {error}"
                ) from error
        return scheduler.state_dict()


def _apply_hyperparameters(optimizer: Optimizer, saved: dict[str, Any], names: set[str] | None) -> None:
    """Writes the present values of changed hyperparameters, and what follows from them, into a saved state.

    Args:
        optimizer: the optimizer of the present run.
        saved: its state dict in the checkpoint, which the function changes.
        names: the names of the changed hyperparameters; None for all.
    """
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        changed = own.keys() - {"params"} if names is None else names
        group.update({name: own[name] for name in changed & own.keys()})
        if "lr" in changed and "initial_lr" in group:
            group["initial_lr"] = own["lr"]
        for index in group.get("params", ()):
            entry = saved["state"].get(index, {})
            if "amsgrad" in changed and not own["amsgrad"]:
                entry.pop("max_exp_avg_sq", None)
            elif "amsgrad" in changed and isinstance(square := entry.get("exp_avg_sq"), Tensor):
                # The largest second moment that is known: torch's Adam needs the entry.
                entry["max_exp_avg_sq"] = square.clone()
            # Later averages must not begin with these.
            if "ema_decay" in changed and own["ema_decay"] is None:
                entry.pop("average", None)
            if "master_weights" in changed and not own["master_weights"]:
                entry.pop("master_weight", None)


def _copy_schedule(optimizer: Optimizer, saved: dict[str, Any], schedulers: list[Any], lr_changed: bool) -> None:
    """Copies what schedulers have written into the groups of an optimizer to the groups of its saved state.

    Args:
        optimizer: the optimizer of the present run.
        saved: its state dict in the checkpoint, which the function changes.
        schedulers: the schedulers of the optimizer.
        lr_changed: True if the learning rate of the present run differs from that of the checkpoint's run.
    """
    if schedulers and all(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers) and not lr_changed:
        return
    cycled = ("momentum", "betas") if any(getattr(s, "cycle_momentum", False) for s in schedulers) else ()
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        by_scheduler = own.keys() - optimizer.defaults.keys() - {"params"}
        group.update({name: own[name] for name in {"lr", *cycled, *by_scheduler} & own.keys()})


def _finished_calls(config: LRSchedulerConfig, checkpoint: dict[str, Any], trainer: pl.Trainer) -> int:
    """Returns the number of calls that a scheduler would have got from Lightning before the checkpoint was saved."""
    if config.interval == "epoch":
        return _finished_epochs(checkpoint) // config.frequency
    steps = checkpoint["global_step"] // max(1, len(trainer.optimizers))
    if config.frequency == 1:
        return steps
    # Lightning sets the loaders up later.
    trainer.fit_loop.setup_data()
    return count_calls(steps, config.frequency, trainer.num_training_batches, trainer.accumulate_grad_batches)


def _finished_epochs(checkpoint: dict[str, Any]) -> int:
    """Returns the number of epochs whose last training batch was done when the checkpoint was saved."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return checkpoint["epoch"] + bool(progress.get("is_last_batch"))


def _is_known(scheduler: Any) -> bool:
    """Returns True for the schedulers of torch and lightkit, whose states have the whole schedule."""
    module = type(scheduler).__module__
    return module == "torch.optim.lr_scheduler" or module.startswith("lightkit.")


def _schedule_of(state: Any) -> Any:
    """Returns the entries of a scheduler's state that describe the schedule; the schedulers within have such states."""
    if isinstance(state, dict):
        return {name: _schedule_of(value) for name, value in state.items() if name not in _PROGRESS}
    return [_schedule_of(value) for value in state] if isinstance(state, (list, tuple)) else state


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    # A one-element tensor may be a learning rate.
    numbers = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (one, other)]
    return not any(isinstance(x, Tensor) for x in numbers) and bool(numbers[0] == numbers[1])


def changed_names(mine: dict[str, Any], theirs: dict[str, Any], ignored: Iterable[str] = ()) -> set[str]:
    """Returns the keys under which two mappings have different values, or that one of them lacks."""
    names = (mine.keys() | theirs.keys()) - set(ignored)
    return {name for name in names if name not in mine or name not in theirs or not _is_equal(mine[name], theirs[name])}
