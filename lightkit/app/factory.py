"""A factory that builds a `TrainingJob` from a configuration; only the records of a run read the configuration too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from lightkit.app.checks import check_accelerator, check_outputs
from lightkit.app.resume import ResumePoint, find_resume_point
from lightkit.callbacks import TestRecorder
from lightkit.callbacks.save_metrics import SaveMetrics
from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, AtomicXLACheckpointIO
from lightkit.checkpoints.training_state import CheckTrainingState
from lightkit.config import build as build_object
from lightkit.config import to_plain
from lightkit.strategies import tpu


@dataclass(frozen=True)
class TrainingJob:
    """The objects of a training.

    Args:
        name: the name of the job; its runs lie below ``runs/<name>``.
        run_dir: the directory of the run.
        data: the data module.
        task: the task with its model, optimizer and scheduler.
        trainer: the trainer with its strategy, loggers and callbacks.
        recorder: the callback of ``trainer`` that records the predictions on the test set for the report.
        resume: the checkpoint from which the training resumes; None for a new training.
        tests: True if the job evaluates on the test set after the training.
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
    """A callback that saves the configuration in every checkpoint, from which `lightkit.app.restore` builds the task.

    Args:
        config: the configuration of the job.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = OmegaConf.to_container(config, resolve=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the configuration to ``checkpoint`` as dicts and lists, which load with ``weights_only=True``."""
        checkpoint[CONFIG_KEY] = self._config


def build(config: DictConfig) -> TrainingJob:
    """Seeds all random number generators and builds the objects of a training.

    Args:
        config: the configuration of the job; `lightkit.app.checks.check` has accepted it.

    Raises:
        LightkitError: the configuration, the data or the checkpoint cannot be used.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    task = build_task(config)
    if config.compile:
        # Module.compile keeps the names of the parameters. The task stays uncompiled, because its logging would break
        # the graph.
        model = task.model
        assert isinstance(model, torch.nn.Module)
        model.compile()
    resume = find_resume_point(config, task)
    recorder = TestRecorder()
    trainer = build_trainer(
        config,
        callbacks=[
            *build_object(config.get("callbacks") or {}).values(),
            *(SaveConfig(config), SaveMetrics(), recorder),
            *([CheckTrainingState(resume.path)] if resume is not None else []),
        ],
        logger=list(build_object(config.get("logger") or {}).values()),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    return TrainingJob(config.name, Path(config.run_dir), data, task, trainer, recorder, resume, config.test)


def build_task(config: DictConfig) -> pl.LightningModule:
    """Builds the task with its model, optimizer and scheduler from the configuration of a job."""
    # The override ~scheduler removes the key; scheduler=none does the same.
    scheduler = build_object(config.get("scheduler"))
    model, optimizer = build_object(config.model), build_object(config.optim)
    return build_object(config.task, model=model, optimizer=optimizer, scheduler=scheduler)


def build_data(config: DictConfig) -> pl.LightningDataModule:
    """Builds the data module of a job and checks that the model has as many classes as the data.

    Raises:
        ConfigError: the numbers of classes do not fit: see `lightkit.app.checks.check_outputs`.
    """
    data = build_object(config.data)
    check_outputs(data, config.model)
    return data


def build_trainer(config: DictConfig, **options: Any) -> pl.Trainer:
    """Builds the trainer with its strategy.

    Args:
        config: the configuration of the job.
        **options: arguments of the trainer for which the configuration has no keys.
    """
    if config.trainer.get("accelerator") == "tpu":
        check_accelerator(config)
        return _build_tpu_trainer(config, **options)
    return build_object(config.trainer, strategy=build_object(config.strategy) or "auto", **options)


def _build_tpu_trainer(config: DictConfig, plugins: Iterable[Any] = (), **options: Any) -> pl.Trainer:
    arguments = {**to_plain(config.trainer), **tpu.choose()}
    if arguments["strategy"] == "auto":
        # Lightning's XLA strategy rejects a CheckpointIO of any other class.
        plugins = [AtomicXLACheckpointIO() if type(p) is AtomicCheckpointIO else p for p in plugins]
    strategy = arguments.pop("strategy")
    return build_object(arguments, strategy=strategy, plugins=list(plugins), **options)
