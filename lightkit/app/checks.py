"""Checks of a configuration that would otherwise fail in the middle of a job."""

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

# Experiments for data without classes, by the unit that the data module serves.
_EXPERIMENTS_BY_UNIT = {"tokens": ("language_model", "char_rnn"), "windows": ("forecast",)}

# Python, NumPy and torch all accept the seeds below this limit.
_SEED_LIMIT = 2**32


def check(config: DictConfig) -> None:
    """Rejects wrong values of a training configuration before the job compiles, reads or trains anything.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: a value is wrong; the message names the key.
    """
    if not 0 <= config.seed < _SEED_LIMIT:
        raise ConfigError(f"seed must be from 0 to {_SEED_LIMIT - 1}, got {config.seed}")
    check_accelerator(config)
    check_scheduler(config)


def check_outputs(data: pl.LightningDataModule, model: Mapping[str, Any]) -> None:
    """Rejects a model configuration whose number of classes differs from that of the data.

    Args:
        data: the data module, which has no ``classes`` if its data have none.
        model: the configuration of the model.

    Raises:
        ConfigError: the numbers differ, or the model has classes and the data have none.
    """
    classes = getattr(data, "num_classes", None)
    for key in ("num_classes", "num_outputs"):
        outputs = model.get(key)
        if classes is not None and outputs is not None and classes != outputs:
            raise ConfigError(f"the data has {classes} classes but model.{key} is {outputs}")
    if classes is None and isinstance(data, (SeriesDataModule, Text)) and "num_classes" in model:
        raise ConfigError(
            f"{type(data).__name__} serves {data.unit}, which have no classes for the model to tell apart; "
            f"experiments for it: {', '.join(_EXPERIMENTS_BY_UNIT[data.unit])}"
        )


def check_accelerator(config: DictConfig) -> None:
    """Rejects ``trainer.accelerator=tpu`` if the job cannot use a TPU.

    Args:
        config: the configuration of the job; the function does nothing for another accelerator.

    Raises:
        ConfigError: no package for TPUs is installed, the machine has no TPU, ``trainer.devices`` is not 1, or
            ``strategy`` is not ``auto``, since the other strategies need several processes.
    """
    if config.trainer.get("accelerator") != "tpu":
        return
    tpu.choose()
    if config.trainer.devices not in (1, "1"):
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: the command line trains on one TPU; for several, use "
            "Lightning's Trainer(strategy='xla') in a script of your own"
        )
    if config.strategy.get("_target_") is not None:
        raise ConfigError(
            f"{config.strategy._target_} needs several processes, and the command line uses one TPU: use strategy=auto"
        )


def check_scheduler(config: DictConfig) -> None:
    """Rejects a scheduler of torch that fails at its first step, which training reaches after a whole epoch.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: the first step fails; the message has the arguments and the error of the scheduler.
    """
    make = build(config.get("scheduler"))
    # Another package's scheduler may need attributes that the optimizer below does not have.
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
def lightning_errors_as_config_errors() -> Iterator[None]:
    """Converts, within the context, the errors by which Lightning rejects a configuration into a `ConfigError`.

    Lightning's own code raises a ValueError or a RuntimeError for that. The same errors from other code are faults of
    the program and pass unchanged.

    Raises:
        ConfigError: Lightning rejected the configuration; the message is Lightning's.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lightning."):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
