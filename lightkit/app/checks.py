"""Rejects configurations that would fail later, in the middle of a job."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightkit.config import build
from lightkit.data import SeriesDataModule, Text
from lightkit.errors import ConfigError
from lightkit.strategies import tpu

# The experiments whose data serve units that have no classes, by that unit.
_EXPERIMENTS = {"tokens": ("language_model", "char_rnn"), "windows": ("forecast",)}

# Seeds that Python, NumPy and torch all take.
_SEEDS = 2**32


def check(config: DictConfig) -> None:
    """Rejects values of a training before anything is compiled, read or trained.

    Raises:
        ConfigError: names the key.
    """
    if not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"seed must be from 0 to {_SEEDS - 1}, got {config.seed}")
    check_accelerator(config)
    check_scheduler(config)


def check_outputs(data: pl.LightningDataModule, model: Mapping[str, Any]) -> None:
    """Rejects a model whose configuration has another number of classes than the data, which may have none.

    Raises:
        ConfigError: says both numbers.
    """
    classes = getattr(data, "num_classes", None)
    for key in ("num_classes", "num_outputs"):
        outputs = model.get(key)
        if classes is not None and outputs is not None and classes != outputs:
            raise ConfigError(f"the data has {classes} classes but model.{key} is {outputs}")
    if classes is None and isinstance(data, (SeriesDataModule, Text)) and "num_classes" in model:
        raise ConfigError(
            f"{type(data).__name__} serves {data.unit}, in which there are no classes for the model to tell apart; "
            f"experiments for it: {', '.join(_EXPERIMENTS[data.unit])}"
        )


def check_accelerator(config: DictConfig) -> None:
    """Rejects a TPU that cannot be had, before anything is compiled or read.

    Raises:
        ConfigError: nothing is installed that knows TPUs, there is none, or several are asked for.
    """
    if config.trainer.get("accelerator") != "tpu":
        return
    tpu.choose()
    if config.trainer.devices not in (1, "1"):
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: the command line trains on one TPU; several are what "
            "Lightning's Trainer(strategy='xla') is for, in a script of your own"
        )
    if config.strategy.get("_target_") is not None:
        raise ConfigError(
            f"{config.strategy._target_} needs several processes, and the command line uses one TPU: use strategy=auto"
        )


def check_scheduler(config: DictConfig) -> None:
    """Rejects a scheduler that fails at its first step, which would otherwise come after an epoch of training.

    Raises:
        ConfigError: gives the arguments of the scheduler, and its error.
    """
    make = build(config.get("scheduler"))
    # A scheduler that is not torch's may need an optimizer that has more than this one.
    if make is None or not config.scheduler._target_.startswith("torch.") or config.trainer.get("max_epochs") == 0:
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    optimizer.step()
    try:
        scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    except (ArithmeticError, ValueError) as error:
        options = ", ".join(f"{key}={value}" for key, value in config.scheduler.items() if key[0] != "_")
        raise ConfigError(f"{config.scheduler._target_}({options}) fails at its first step: {error}") from error


@contextmanager
def errors_of_lightning() -> Iterator[None]:
    """Turns the errors by which Lightning rejects a configuration while it runs into errors of the configuration.

    These are a ValueError or a RuntimeError from Lightning's own code; from other code they are faults of the program.

    Raises:
        ConfigError: has Lightning's words.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lightning."):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
