"""Checks of a configuration that would otherwise fail in the middle of a job."""

from __future__ import annotations

import re
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightkit.app.schedulers import arguments, build_scheduler
from lightkit.config import to_plain
from lightkit.data import SeriesDataModule, TableDataModule, Text
from lightkit.errors import ConfigError
from lightkit.loggers.packages import check_packages
from lightkit.strategies import tpu
from lightkit.tasks.schedule import check_limits, open_length_arguments, with_length, with_rate

# Experiments for data that are no images, by the unit that the data module serves.
_EXPERIMENTS_BY_UNIT = {"tokens": ("language_model", "char_rnn"), "windows": ("forecast",), "rows": ("table",)}

# The models of lightkit that take no rows of numbers and categories.
_MODELS_OF_OTHER_DATA = re.compile(r"lightkit\.models\.(?!MLP$)\w+")

_TABLE = "lightkit.data.TableDataModule"

# Python, NumPy and torch all accept the seeds below this limit.
_SEED_LIMIT = 2**32

# The largest number of steps by which a scheduler is tried, which takes a fraction of a second.
_MAX_SCHEDULER_STEPS = 10_000


def check(config: DictConfig) -> None:
    """Rejects wrong values of a training configuration before the job compiles, reads or trains anything.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: a value is wrong; the message names the key.
    """
    if not 0 <= config.seed < _SEED_LIMIT:
        raise ConfigError(f"seed must be from 0 to {_SEED_LIMIT - 1}, got {config.seed}")
    _check_loggers(config)
    check_accelerator(config)
    check_scheduler(config)
    _check_test_rows(config)


def _check_test_rows(config: DictConfig) -> None:
    """Rejects a table without test rows for a job that tests after the training."""
    data = config.data
    if data.get("_target_") == _TABLE and config.test and data.get("test_size") == 0 and data.get("test_path") is None:
        raise ConfigError("data.test_size=0 leaves no rows for the test; test=false trains without one")


def _check_loggers(config: DictConfig) -> None:
    """Rejects loggers without their packages, and a run directory to which TensorBoard's writer could not write."""
    loggers = (config.get("logger") or {}).values()
    targets = [str(logger.get("_target_")) for logger in loggers if isinstance(logger, Mapping)]
    check_packages(targets)
    if not any("TensorBoard" in target for target in targets):
        return
    # Surrogates stand for the bytes of a path in another encoding.
    if any(unicodedata.category(character) == "Cs" for character in config.run_dir):
        raise ConfigError(f"run_dir={config.run_dir}: TensorBoard writes to directories in UTF-8 alone; use logger=csv")


def check_outputs(data: pl.LightningDataModule, model: Mapping[str, Any]) -> None:
    """Rejects a model configuration whose number of classes differs from that of the data.

    Args:
        data: the data module, which has no ``classes`` if its data have none.
        model: the configuration of the model.

    Raises:
        ConfigError: the numbers differ, or the model has classes and the data have none.
    """
    if isinstance(data, TableDataModule):
        _check_table_model(data, model)
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


def _check_table_model(data: TableDataModule, model: Mapping[str, Any]) -> None:
    """Rejects a model of lightkit that does not take the rows of a table."""
    target = str(model.get("_target_"))
    if _MODELS_OF_OTHER_DATA.fullmatch(target):
        raise ConfigError(
            f"{type(data).__name__} serves {data.unit} of numbers and categories, which {target} does not take; "
            f"experiments for it: {', '.join(_EXPERIMENTS_BY_UNIT[data.unit])}"
        )
    sizes = data.model_sizes()
    for key in ("input_size", "category_sizes", "num_outputs"):
        given = to_plain(model.get(key))
        if target == "lightkit.models.MLP" and given is not None and given != sizes[key]:
            raise ConfigError(f"model.{key} is {given}, but the table has {sizes[key]}: leave model.{key} out")


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
    """Rejects a scheduler of torch that fails at its first step, or at one of the steps that the training takes.

    Training reaches the first step after a whole epoch, and the end of a `OneCycleLR` after several. The function tries
    schedulers of torch and lightkit alone.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: a step fails; the message has the arguments and the error of the scheduler.
    """
    make = build_scheduler(config.get("scheduler"))
    if make is None or config.trainer.get("max_epochs") == 0:
        return
    # Another package's scheduler may need attributes that the optimizer below does not have.
    if not config.scheduler._target_.startswith(("torch.", "lightkit.")):
        return
    limits = config.trainer.get("max_epochs"), config.trainer.get("max_steps", -1)
    check_limits(open_length_arguments(make), *limits)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    name = config.scheduler._target_
    options = ", ".join(f"{key}={value}" for key, value in arguments(config.scheduler).items())
    # A schedule that has the length of the training ends with it, whatever that length is.
    steps = 1 if open_length_arguments(make) else _scheduler_steps(config)
    scheduler = with_rate(with_length(make, 1000), optimizer)(optimizer)
    optimizer.step()
    for number in range(1, steps + 1):
        try:
            scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        except (ArithmeticError, ValueError) as error:
            if number == 1:
                raise ConfigError(f"{name}({options}) fails at its first step: {error}") from error
            raise ConfigError(
                f"{name}({options}) ends after {number - 1} steps, and the training takes one after each of "
                f"{steps} epochs: set {_length(config, steps)}, or trainer.max_epochs={number - 1}"
            ) from error


def _scheduler_steps(config: DictConfig) -> int:
    """Returns the number of scheduler steps, one after each epoch, that a training certainly takes; 1 if unknown."""
    trainer = config.trainer
    if config.scheduler.get("interval") == "step" or config.scheduler.get("frequency") not in (None, 1):
        return 1
    may_end_early = any(trainer.get(key) not in (None, -1, False) for key in ("max_steps", "max_time", "fast_dev_run"))
    epochs = trainer.get("max_epochs")
    return 1 if may_end_early or not isinstance(epochs, int) else max(1, min(epochs, _MAX_SCHEDULER_STEPS))


def _length(config: DictConfig, steps: int) -> str:
    """Returns the overrides that set the number of steps of a `OneCycleLR`, which rejects any further step."""
    if config.scheduler.get("total_steps") is not None:
        return f"scheduler.total_steps={steps}"
    return f"scheduler.epochs={steps} scheduler.steps_per_epoch=1"


@contextmanager
def lightning_errors_as_config_errors() -> Iterator[None]:
    """Converts the errors by which Lightning or a scheduler of torch rejects a configuration into a `ConfigError`.

    Lightning and torch raise a ValueError or a RuntimeError for that. The function recognizes them by the module that
    raises them; the same errors from other modules are faults of the program and pass unchanged.

    Raises:
        ConfigError: the configuration was rejected; the message is Lightning's or torch's.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        module, message = frame.f_globals["__name__"], " ".join(str(error).split())
        if module == "torch.optim.lr_scheduler":
            raise ConfigError(
                f"the scheduler rejects the optimizer or the length of the training: {message}"
            ) from error
        if not module.startswith("lightning."):
            raise
        raise ConfigError(message) from error
