"""Trainings, roundings and measurements of the models of a compression, all from one checkpoint."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightkit.app import cluster
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.compression_request import CompressionRequest
from lightkit.app.evaluation import build_test_data, precision_of
from lightkit.app.parts import model_of
from lightkit.app.restore import RestoredTask, restore
from lightkit.callbacks import Checkpoint, LeanLoop, Progress
from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, load_checkpoint
from lightkit.compress import (
    QUANTIZATION_KEY,
    Distil,
    Prune,
    QuantizationScheme,
    Quantize,
    Sparsify,
    apply_quantization,
)
from lightkit.compress.calibration import Calibration
from lightkit.compress.save_widths import SaveWidths
from lightkit.data import TableDataModule
from lightkit.errors import ConfigError
from lightkit.loops.hooks import is_overridden
from lightkit.optim import Adam
from lightkit.tasks import ForecastTask, RegressionTask
from lightkit.tasks.task import Task

_DEFAULT_EPOCHS = 5

# Arguments of the dense run's Trainer that say how long an epoch is.
_LIMITS = ("limit_train_batches", "limit_val_batches")

# The batches of training data with which ranges are measured without a training, and those of validation data on which
# the loss of a rounding is measured.
_CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Trained:
    """A model of a compression.

    Attributes:
        task: the task with the model.
        validation: the metrics of the validation set.
        path: the checkpoint.
        levels: the levels and scales of the rounded weights, by name.
        callbacks: the callbacks that made the model smaller.
    """

    task: Task
    validation: dict[str, float]
    path: Path
    levels: dict[str, tuple[Tensor, Tensor]]
    callbacks: list[Callback]


def lacking_loader(data: pl.LightningDataModule, *names: str) -> str | None:
    """Returns the first of some methods, such as ``test_dataloader``, that a data module lacks; None if none is."""
    return next((name for name in names if not is_overridden(name, data, pl.LightningDataModule)), None)


class CompressionJob:
    """The trainings and measurements of models that all begin with one checkpoint.

    Args:
        path: the checkpoint.
        request: the options.
        directory: the directory of the results.

    Attributes:
        restored: the dense model, its data and its checkpoint.
        teacher: the model that teaches with ``distil``.
        epochs: the number of epochs of a training.

    Raises:
        ConfigError: the checkpoint is of another task than lightkit's, or of a quantized model; or its data have no
            test set.
    """

    def __init__(self, path: Path, request: CompressionRequest, directory: Path) -> None:
        self.path, self.request, self.directory = path, request, directory
        self.restored = self._restore()
        model = model_of(self.restored.task)
        if not isinstance(self.restored.task, Task) or model is None:
            raise ConfigError(f"{type(self.restored.task).__name__} is no task of lightkit.tasks with a model")
        if QUANTIZATION_KEY in self.restored.checkpoint:
            raise ConfigError(f"{path} is of a quantized model; compress the checkpoint of a model in float")
        if lacking_loader(data := self._build_data(), "test_dataloader") is not None:
            raise ConfigError(f"{type(data).__name__} has no test_dataloader, with which the models are compared")
        self.teacher = model
        trainer = self.restored.config.get("trainer")
        epochs = trainer.get("max_epochs") if isinstance(trainer, dict) else None
        trained = epochs if isinstance(epochs, int) and 0 < epochs < 10_000 else _DEFAULT_EPOCHS
        self.epochs = request.epochs if request.epochs is not None else trained

    def _restore(self) -> RestoredTask:
        return restore(self.path, for_evaluation=True)

    def _build_data(self) -> pl.LightningDataModule:
        if self.request.data_dir is not None and isinstance(data := self.restored.build_data(), TableDataModule):
            data.path = self.request.data_dir
            return data
        return build_test_data(self.restored, self.request.data_dir, self.request.download)

    def train(
        self,
        directory: Path,
        keep_macs: float | None = None,
        zeros: float | None = None,
        scheme: QuantizationScheme | None = None,
        distil: float = 0.0,
    ) -> Trained:
        """Trains a copy of the dense model, and returns it with its best weights.

        Args:
            directory: the directory of the checkpoints.
            keep_macs: the share of the multiply-adds that is left; None leaves all.
            zeros: the share of zeros; None sets none.
            scheme: the bits of weights and inputs; None leaves them in float.
            distil: the share of the distance to the teacher's outputs in the loss.
        """
        pl.seed_everything(self.request.seed, workers=True, verbose=False)
        restored = self._restore()
        task = restored.task
        assert isinstance(task, Task)
        task.train().requires_grad_(True)
        task.use_optimizer(
            partial(Adam, lr=self.request.lr), partial(torch.optim.lr_scheduler.CosineAnnealingLR, **{"T_max": None})
        )
        compression: list[Callback] = []
        if distil > 0:
            is_value = isinstance(task, (ForecastTask, RegressionTask))
            targets = "values" if is_value else "classes"
            compression.append(Distil(copy.deepcopy(self.teacher), distil, targets=targets))
        if keep_macs is not None:
            compression.append(Prune(keep_macs, start=0.0, end=0.4))
        if zeros is not None:
            compression.append(Sparsify(zeros, start=0.2, end=0.7))
        if scheme is not None:
            # The widths of the layers are final by then, and the ranges are measured anew at the end.
            start = 0.1 if keep_macs is None else 0.45
            compression.append(Quantize(scheme.bits, start=start, end=0.75, layers=scheme.layers))
        best = Checkpoint(directory, "best", monitor="val/loss", save_last=False, enable_version_counter=False)
        trainer = self._trainer(
            [*compression, SaveWidths(), _SaveConfig(restored.config), best, LeanLoop(), Progress()]
        )
        data = self._build_data()
        with lightning_errors_as_config_errors():
            trainer.fit(task, datamodule=data)
            path = best.best_model_path
            if not path:
                # Without validation data the last weights are the best.
                trainer.save_checkpoint(path := str(directory / "best.ckpt"))
            is_validated = lacking_loader(data, "val_dataloader") is None
            found = trainer.validate(task, datamodule=data, ckpt_path=path, verbose=False) if is_validated else []
        levels = apply_quantization(task, load_checkpoint(path))
        return Trained(task, dict(found[0]) if found else {}, Path(path), levels, compression)

    def calibrate(self, scheme: QuantizationScheme, bits: int) -> tuple[Task, Calibration]:
        """Returns a copy of the dense model, and its `Calibration` on samples of the training data.

        Args:
            scheme: decides which inputs are rounded.
            bits: the fewest bits that weights will get.
        """
        task = self._restore().task
        assert isinstance(task, Task)
        run = self._evaluation(task, "fit", lambda data: data.train_dataloader())
        return task, Calibration(task, scheme, run, bits)

    def validation_loss(self, task: Task) -> Callable[[], float]:
        """Returns a function that measures the loss of a task on some batches of the validation data."""
        run = self._evaluation(task, "validate", lambda data: data.val_dataloader())
        return lambda: run().get("val/loss", float("nan"))

    def round(self, spec: dict[str, Any]) -> Trained:
        """Rounds the weights and inputs of a copy of the dense model, and writes its checkpoint.

        Args:
            spec: the entry of the checkpoint under `lightkit.compress.QUANTIZATION_KEY`.
        """
        restored = self._restore()
        task = restored.task
        assert isinstance(task, Task)
        checkpoint = {**restored.checkpoint, QUANTIZATION_KEY: spec}
        levels = apply_quantization(task, checkpoint)
        path = self.directory / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        AtomicCheckpointIO(plain_hyperparameters=True).save_checkpoint(checkpoint, path)
        return Trained(task, self.validate(task), path, levels, [Quantize()])

    def _evaluation(
        self, task: Task, stage: str, loader: Callable[[pl.LightningDataModule], Any]
    ) -> Callable[[], dict[str, float]]:
        """Returns a function that validates a task on the first batches of a loader, and returns the metrics."""
        data = self._build_data()
        data.prepare_data()
        data.setup(stage)
        loaded = itertools.islice(loader(data), _CALIBRATION_BATCHES)
        # A Trainer without the data module would leave out its preparation of batches.
        batches: Any = [data.on_after_batch_transfer(batch, 0) for batch in loaded]

        def run() -> dict[str, float]:
            with lightning_errors_as_config_errors():
                # These are no shares of the validation set, which the limits of the run speak of.
                trainer = self._trainer([], limit_val_batches=1.0)
                found = trainer.validate(task, DataLoader(batches, batch_size=None), verbose=False)
            return dict(found[0]) if found else {}

        return run

    def validate(self, task: pl.LightningModule) -> dict[str, float]:
        """Returns the metrics of a task on the validation set; {} without one."""
        if lacking_loader(self._build_data(), "val_dataloader") is not None:
            return {}
        with lightning_errors_as_config_errors():
            found = self._trainer([]).validate(task, datamodule=self._build_data(), verbose=False)
        return dict(found[0]) if found else {}

    def test(self, task: Task, callbacks: Sequence[Callback]) -> dict[str, float]:
        """Returns the metrics of a task on the test set.

        Args:
            task: the task.
            callbacks: the callbacks of the Trainer.
        """
        with lightning_errors_as_config_errors():
            (metrics,) = self._trainer(callbacks).test(task, datamodule=self._build_data(), verbose=False)
        return dict(metrics)

    def test_batches(self) -> Iterator[Any]:
        """Yields the batches of the test set, as the task takes them."""
        data = self._build_data()
        data.prepare_data()
        data.setup("test")
        for batch in data.test_dataloader():
            yield data.on_after_batch_transfer(batch, 0)

    def _limits(self) -> dict[str, Any]:
        """Returns the shares of the data that the dense run took for an epoch, as arguments of a Trainer."""
        trainer = self.restored.config.get("trainer")
        found = {name: trainer.get(name) for name in _LIMITS} if isinstance(trainer, dict) else {}
        # The configuration is a stranger's.
        return {
            name: value
            for name, value in found.items()
            if (type(value) is int and value > 0) or (type(value) is float and 0 < value <= 1)
        }

    def _trainer(self, callbacks: Sequence[Callback], **limits: float) -> pl.Trainer:
        return pl.Trainer(
            accelerator=self.request.accelerator,
            devices=1,
            max_epochs=max(1, self.epochs),
            **{**self._limits(), **limits},
            precision=precision_of(self.restored),  # pyright: ignore[reportArgumentType]
            plugins=[AtomicCheckpointIO(plain_hyperparameters=True), *cluster.plugins()],
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, Progress) for callback in callbacks),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
        )


class _SaveConfig(Callback):
    """Saves the plain configuration of the dense run in every checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self._config
