"""The objects of a job, built from its configuration."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, AtomicXLACheckpointIO
from lightkit.config import build
from lightkit.data import SeriesDataModule, Text
from lightkit.errors import ConfigError
from lightkit.strategies import tpu

# By what their data serve, those whose model is no classifier.
_EXPERIMENTS = {"tokens": ("language_model", "char_rnn"), "windows": ("forecast",)}


class SaveConfig(Callback):
    """Puts the configuration into every checkpoint, which makes it complete: see `lightkit.app.restore`."""

    def __init__(self, config: DictConfig) -> None:
        self._config = OmegaConf.to_container(config, resolve=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds plain containers, which load with ``weights_only=True``."""
        checkpoint[CONFIG_KEY] = self._config


def build_task(config: DictConfig) -> pl.LightningModule:
    """The task with its model, optimizer and scheduler."""
    # ~scheduler on the command line says the same as scheduler=none.
    scheduler = build(config.get("scheduler"))
    return build(config.task, model=build(config.model), optimizer=build(config.optim), scheduler=scheduler)


def build_data(config: DictConfig) -> pl.LightningDataModule:
    """The data module, checked to have as many classes as the model where both say."""
    data = build(config.data)
    check_outputs(data, config.model)
    return data


def check_outputs(data: pl.LightningDataModule, model: Mapping[str, Any]) -> None:
    """Refuses a model whose configuration has other classes than the data, or classes where the data have none.

    Raises:
        ConfigError: says both.
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


def build_trainer(config: DictConfig, **options: Any) -> pl.Trainer:
    """The trainer with its strategy, and with what the configuration has no word for."""
    if config.trainer.get("accelerator") == "tpu":
        check_accelerator(config)
        return _build_tpu_trainer(config, **options)
    return build(config.trainer, strategy=build(config.strategy) or "auto", **options)


def _build_tpu_trainer(config: DictConfig, plugins: Iterable[Any] = (), **options: Any) -> pl.Trainer:
    trainer = OmegaConf.to_container(config.trainer, resolve=True, throw_on_missing=True)
    trainer |= tpu.choose()
    if trainer["strategy"] == "auto":
        # Lightning's own strategy takes no other plug-in for checkpoints than one made for it.
        plugins = [AtomicXLACheckpointIO() if type(p) is AtomicCheckpointIO else p for p in plugins]
    strategy = trainer.pop("strategy")
    return build(trainer, strategy=strategy, plugins=list(plugins), **options)


def check_accelerator(config: DictConfig) -> None:
    """Refuses a TPU that cannot be had, before anything is compiled or read.

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
        raise ConfigError(f"one TPU has nobody to go with for {config.strategy._target_}: use strategy=auto")


def check_scheduler(config: DictConfig) -> None:
    """Refuses a scheduler that fails at its first step, which would otherwise come after an epoch of training.

    Raises:
        ConfigError: says what it was built of, and what goes wrong.
    """
    make = build(config.get("scheduler"))
    # One of somebody else may need an optimizer that has more than this one.
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
def refusals_of_lightning() -> Iterator[None]:
    """Makes what Lightning does not take of a configuration, and says while it runs, an error of the configuration.

    It says so by a ValueError or a RuntimeError out of its own code; out of other code they are faults of the program.

    Raises:
        ConfigError: in Lightning's words.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lightning."):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
