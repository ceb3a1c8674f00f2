"""A factory that builds a `TrainingJob` from a configuration; only the records of a run read the configuration too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightkit._util.printable import printable
from lightkit.app import cluster
from lightkit.app.checks import check_accelerator, check_outputs
from lightkit.app.compression import build_compression
from lightkit.app.image_sizes import check_image_size
from lightkit.app.model_sizes import fill
from lightkit.app.own_classes import drop_unused_parts, objects
from lightkit.app.parts import model_of, taken_parts
from lightkit.app.profiling import build_profiler
from lightkit.app.resume import ResumePoint, find_resume_point
from lightkit.app.schedulers import build_scheduler
from lightkit.callbacks import AveragedWeights, TestRecorder
from lightkit.callbacks.check_monitors import CheckMonitors
from lightkit.callbacks.save_metrics import SaveMetrics
from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, AtomicXLACheckpointIO
from lightkit.checkpoints.training_state import CheckTrainingState
from lightkit.compress.save_widths import SaveWidths
from lightkit.config import build as build_object
from lightkit.config import to_plain
from lightkit.errors import ConfigError
from lightkit.finetune import Freeze, load_initial_weights
from lightkit.strategies import tpu
from lightkit.targets import find_class

# Keys of ``conf/optim`` that optimizers of torch do not have.
_OPTIONS = ("ema_decay", "max_grad_norm")


@dataclass(frozen=True)
class TrainingJob:
    """The objects of a training.

    Args:
        config: the configuration of the job, in which the data have set the sizes: see `lightkit.app.model_sizes`.
        name: the name of the job; its runs lie below ``runs/<name>``.
        run_dir: the directory of the run.
        data: the data module.
        task: the task with its model, optimizer and scheduler.
        trainer: the trainer with its strategy, loggers and callbacks.
        recorder: the callback of ``trainer`` that records the predictions on the test set for the report.
        resume: the checkpoint from which the training resumes; None for a new training.
        tests: True if the job evaluates on the test set after the training.
    """

    config: DictConfig
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
    drop_unused_parts(config)
    data = build_data(config)
    config = fill(config, data)
    fill_class_counts(config, data)
    task = build_task(config)
    model = model_of(task)
    check_image_size(data, model)
    began = _load_initial_weights(config, task)
    if config.compile:
        if model is None:
            raise ConfigError(
                f"compile=true compiles the attribute `model` of the task, which {config.task._target_} lacks"
            )
        # Module.compile keeps the names of the parameters. The task stays uncompiled, because its logging would break
        # the graph.
        model.compile()
    resume = find_resume_point(config, task)
    recorder = TestRecorder()
    trainer = build_trainer(
        config,
        callbacks=[
            # Freeze comes first: the other callbacks then find the parameters that are trained.
            *_build_freeze(config),
            *build_compression(config),
            *_build_entries(config, "callbacks", Callback),
            *(AveragedWeights(), SaveWidths(), CheckMonitors(), SaveConfig(config), SaveMetrics(), recorder),
            # The check comes last: it compares the states with the present optimizers and schedulers.
            *([resume.settings, CheckTrainingState(resume.path)] if resume is not None else []),
        ],
        logger=_build_entries(config, "logger", Logger),
        # Many modules pass all of their arguments to save_hyperparameters, also the model, optimizer and scheduler.
        plugins=[AtomicCheckpointIO(plain_hyperparameters=True)],
        enable_model_summary=False,
    )
    if began is not None and trainer.is_global_zero:
        print(began, flush=True)
    return TrainingJob(config, config.name, Path(config.run_dir), data, task, trainer, recorder, resume, config.test)


def build_task(config: DictConfig) -> pl.LightningModule:
    """Builds the task from the configuration of a job, with those of model, optimizer and scheduler that it takes.

    Raises:
        ConfigError: a class is unknown, or the class of the task is no LightningModule.
    """
    task = to_plain(config.task)
    if isinstance(task.get("metrics"), dict):
        task["metrics"] = {name: metric for name, metric in task["metrics"].items() if metric is not None}
    # The override ~scheduler removes the key; scheduler=none does the same.
    makers = {
        "model": lambda: _build_model(config),
        "optimizer": lambda: _build_optimizer(config),
        "scheduler": lambda: build_scheduler(config.get("scheduler")),
    }
    taken = taken_parts(find_class(str(task["_target_"])), task) if task.get("_target_") is not None else set()
    # Each part draws its random numbers in this order.
    built = build_object(task, **{name: make() for name, make in makers.items() if name in taken})
    if not isinstance(built, pl.LightningModule):
        raise ConfigError(f"task._target_ must be a LightningModule, got {task.get('_target_')}")
    return built


def _build_model(config: DictConfig) -> torch.nn.Module:
    model = build_object(config.model)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model._target_ must be a torch.nn.Module, got {(config.model or {}).get('_target_')}")
    return model


def _build_optimizer(config: DictConfig) -> Any:
    # Only lightkit's optimizers take the options that are null by default.
    options = {
        name: value for name, value in to_plain(config.optim).items() if value is not None or name not in _OPTIONS
    }
    # The parameters of the model come later.
    return build_object({**options, "_partial_": True} if "_target_" in options else options)


def fill_class_counts(config: DictConfig, data: pl.LightningDataModule) -> None:
    """Sets each ``num_classes`` of the task that is null to the number of classes of the data, in place.

    The metrics take the number of classes from the model, and a model of a user's need not have such an argument.

    Args:
        config: the configuration of the job.
        data: the data module; its attribute ``num_classes``, else the length of ``classes``, is the number.

    Raises:
        ConfigError: a metric of torchmetrics for several classes has no number, and the data have none.
    """
    plain = to_plain(config.task)
    names = getattr(data, "classes", None)
    count = getattr(data, "num_classes", len(names) if isinstance(names, (list, tuple)) else None)
    for path, node in objects(plain, ("task",)):
        if "num_classes" not in node or node["num_classes"] is not None:
            continue
        key = ".".join((*path, "num_classes"))
        if count is not None:
            with read_write(config), open_dict(config):
                OmegaConf.update(config, key, int(count))
        elif str(node["_target_"]).rpartition(".")[2].startswith("Multiclass"):
            raise ConfigError(
                f"{key} has no value: the configuration of the model has no num_classes, and {type(data).__name__} has "
                f"no attribute num_classes; set {key}=NUMBER, or {'.'.join(path)}=null to leave the metric out"
            )


def _load_initial_weights(config: DictConfig, task: pl.LightningModule) -> str | None:
    """Loads the weights that ``init_from`` names, and returns a line for the user; None if ``init_from`` is null.

    A training that resumes does not load them: it has the weights of its checkpoint.
    """
    path = config.get("init_from")
    if path is None:
        if config.get("init_skip"):
            raise ConfigError("init_skip has no effect without init_from, which names the file of the weights")
        return None
    if config.ckpt_path is not None:
        return f"init_from={printable(path)} is not read again: the training resumes from {printable(config.ckpt_path)}"
    model = model_of(task)
    # The metrics and the buffers of a task are no weights; a module of a user's may have layers beside its model.
    is_whole = model is not None and {*map(id, task.parameters())} == {*map(id, model.parameters())}
    module = model if model is not None and is_whole else task
    return f"init_from={printable(path)}: {load_initial_weights(module, path, to_plain(config.get('init_skip') or []))}"


def _build_freeze(config: DictConfig) -> list[Freeze]:
    patterns, unfreeze = to_plain(config.get("freeze")) or [], to_plain(config.get("unfreeze")) or None
    return [Freeze(patterns, unfreeze)] if patterns or unfreeze else []


def _build_entries(config: DictConfig, group: str, kind: type) -> list[Any]:
    """Builds the entries of a group, such as the callbacks; an entry that is null is left out.

    Args:
        config: the configuration of the job.
        group: the name of the group.
        kind: the class that each entry must be an instance of.

    Raises:
        ConfigError: an entry is no configuration of such an object.
    """
    entries = build_object(config.get(group) or {})
    for name, entry in entries.items():
        if entry is not None and not isinstance(entry, kind):
            raise ConfigError(
                f"{group}.{name} must be null or have a _target_ that is a {kind.__name__}, got {entry!r}"
            )
    return [entry for entry in entries.values() if entry is not None]


def build_data(config: DictConfig) -> pl.LightningDataModule:
    """Builds the data module of a job and checks that the model has as many classes as the data.

    Raises:
        ConfigError: the numbers of classes do not fit: see `lightkit.app.checks.check_outputs`; or the data module
            serves no folds.
    """
    # The sizes of a table may differ between folds.
    data = _fold_of(build_object(config.data), config)
    if config.model is not None:
        check_outputs(data, config.model)
    return data


def _fold_of(data: pl.LightningDataModule, config: DictConfig) -> pl.LightningDataModule:
    """Returns the data module of the fold that the configuration names; ``data`` itself without folds."""
    if (count := config.get("kfold")) is None:
        return data
    with_fold = getattr(data, "with_fold", None)
    if with_fold is None:
        raise ConfigError(
            f"kfold={count}: {type(data).__name__} serves no folds: it has no method with_fold(index, count)"
        )
    return with_fold(config.fold, count)


def build_trainer(config: DictConfig, **options: Any) -> pl.Trainer:
    """Builds the trainer with its strategy.

    Args:
        config: the configuration of the job.
        **options: arguments of the trainer for which the configuration has no keys.
    """
    if config.trainer.get("accelerator") == "tpu":
        check_accelerator(config)
        return _build_tpu_trainer(config, **options)
    options["plugins"] = [*options.get("plugins", ()), *cluster.plugins(config.trainer.get("devices"))]
    strategy = build_object(config.strategy) or "auto"
    return build_object(_trainer_arguments(config), strategy=strategy, profiler=_profiler(config), **options)


def _trainer_arguments(config: DictConfig) -> dict[str, Any]:
    return {name: value for name, value in to_plain(config.trainer).items() if name != "profiler"}


def _profiler(config: DictConfig) -> Any:
    return build_profiler(to_plain(config.trainer.get("profiler")), config.run_dir)


def _build_tpu_trainer(config: DictConfig, plugins: Iterable[Any] = (), **options: Any) -> pl.Trainer:
    arguments = {**_trainer_arguments(config), **tpu.choose()}
    if arguments["strategy"] == "auto":
        # Lightning's XLA strategy rejects a CheckpointIO of any other class.
        plugins = [
            AtomicXLACheckpointIO(p.plain_hyperparameters) if type(p) is AtomicCheckpointIO else p for p in plugins
        ]
    strategy = arguments.pop("strategy")
    return build_object(arguments, strategy=strategy, profiler=_profiler(config), plugins=list(plugins), **options)
