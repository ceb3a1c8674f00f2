"""Builds the objects of a training from its configuration, which nobody else reads except the record of the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from lightkit.app.checks import check_accelerator, check_outputs
from lightkit.app.resume import ResumePoint, find_resume_point
from lightkit.callbacks import TestRecorder
from lightkit.callbacks.save_figures import SaveFigures
from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, AtomicXLACheckpointIO
from lightkit.checkpoints.training_state import CheckTrainingState
from lightkit.config import build as build_object
from lightkit.strategies import tpu


@dataclass(frozen=True)
class TrainingJob:
    """The objects of a training.

    Args:
        name: of the runs of the same kind.
        run_dir: the directory of the run.
        data: the data module.
        task: the task with its model, optimizer and scheduler.
        trainer: with its strategy, loggers and callbacks.
        recorder: the callback of ``trainer`` that keeps the predictions of the test.
        resume: the checkpoint to go on from; None for a training that begins.
        tests: measure on the test set after the training.
    """

    name: str
    run_dir: Path
    data: pl.LightningDataModule
    task: pl.LightningModule
    trainer: pl.Trainer
    recorder: TestRecorder
    resume: ResumePoint | None
    tests: bool


class SaveConfig(Callback):
    """Puts the configuration into every checkpoint, so that `lightkit.app.restore` needs nothing else."""

    def __init__(self, config: DictConfig) -> None:
        self._config = OmegaConf.to_container(config, resolve=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds plain containers, which load with ``weights_only=True``."""
        checkpoint[CONFIG_KEY] = self._config


def build(config: DictConfig) -> TrainingJob:
    """Builds all objects of a training, which `lightkit.app.checks` has seen; seeds all random numbers first.

    Raises:
        LightkitError: something in the configuration, the data or the checkpoint cannot be used.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    task = build_task(config)
    if config.compile:
        # In place, and the model alone: parameters keep their names, and what a LightningModule logs stays outside.
        task.model.compile()
    resume = find_resume_point(config, task)
    recorder = TestRecorder()
    trainer = build_trainer(
        config,
        callbacks=[
            *build_object(config.get("callbacks") or {}).values(),
            *(SaveConfig(config), SaveFigures(), recorder),
            *([CheckTrainingState(resume.path)] if resume is not None else []),
        ],
        logger=list(build_object(config.get("logger") or {}).values()),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    return TrainingJob(config.name, Path(config.run_dir), data, task, trainer, recorder, resume, config.test)


def build_task(config: DictConfig) -> pl.LightningModule:
    """Builds the task with its model, optimizer and scheduler."""
    # ~scheduler on the command line says the same as scheduler=none.
    scheduler = build_object(config.get("scheduler"))
    model, optimizer = build_object(config.model), build_object(config.optim)
    return build_object(config.task, model=model, optimizer=optimizer, scheduler=scheduler)


def build_data(config: DictConfig) -> pl.LightningDataModule:
    """Builds the data module, checked to have as many classes as the model where both say."""
    data = build_object(config.data)
    check_outputs(data, config.model)
    return data


def build_trainer(config: DictConfig, **options: Any) -> pl.Trainer:
    """Builds the trainer with its strategy.

    Args:
        config: of the job.
        **options: further arguments of the trainer, for which the configuration has no keys.
    """
    if config.trainer.get("accelerator") == "tpu":
        check_accelerator(config)
        return _build_tpu_trainer(config, **options)
    return build_object(config.trainer, strategy=build_object(config.strategy) or "auto", **options)


def _build_tpu_trainer(config: DictConfig, plugins: Iterable[Any] = (), **options: Any) -> pl.Trainer:
    trainer = OmegaConf.to_container(config.trainer, resolve=True, throw_on_missing=True)
    trainer |= tpu.choose()
    if trainer["strategy"] == "auto":
        # Lightning's own strategy takes no other plug-in for checkpoints than one made for it.
        plugins = [AtomicXLACheckpointIO() if type(p) is AtomicCheckpointIO else p for p in plugins]
    strategy = trainer.pop("strategy")
    return build_object(trainer, strategy=strategy, plugins=list(plugins), **options)
