"""Compression of a finished run, for `lightkit.compress`: trains a smaller model and compares it with the dense one."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightkit import native
from lightkit.app import cluster, run_files
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.compression_outcome import compression_outcome
from lightkit.app.compression_report import ACCURACY, Comparison, content, page
from lightkit.app.deployment import bytes_of, write_deployed
from lightkit.app.evaluation import build_test_data, precision_of
from lightkit.app.model_measurements import accuracy_interval, latencies, multiply_adds
from lightkit.app.parts import model_of
from lightkit.app.restore import RestoredTask, restore
from lightkit.callbacks import Checkpoint, LeanLoop, Progress, TestRecorder
from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO, load_checkpoint
from lightkit.compress import (
    QUANTIZATION_KEY,
    Distil,
    Prune,
    QuantizationScheme,
    Quantize,
    Sparsify,
    apply_quantization,
    calibrate,
)
from lightkit.compress.save_widths import SaveWidths
from lightkit.data import TableDataModule
from lightkit.errors import ConfigError
from lightkit.optim import Adam
from lightkit.tasks import ForecastTask, RegressionTask
from lightkit.tasks.task import Task

# The shares of the multiply-adds among which max_drop searches.
_SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06)

_DEFAULT_EPOCHS = 5

_BATCH_SIZES = (1, 32)

# The batches of training data with which ranges are measured without a training.
_CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class CompressionRequest:
    """The options of a compression: the keys of ``conf/compress.yaml`` except the checkpoint."""

    keep_macs: float | None = 0.25
    zeros: float | None = None
    bits: int | None = None
    max_drop: float | None = None
    distil: float = 0.0
    epochs: int | None = None
    lr: float = 1e-3
    compare: bool = True
    output: str | None = None
    data_dir: str | None = None
    download: bool = False
    accelerator: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Rejects options that are out of their ranges, or ask for nothing.

        Raises:
            ConfigError: an option is one of these; the message names the option.
        """
        if self.keep_macs is None and self.zeros is None and self.bits is None and self.max_drop is None:
            raise ConfigError("keep_macs, zeros, bits and max_drop are all null: there is nothing to compress")
        if self.bits is not None:
            QuantizationScheme(self.bits)
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ConfigError(f"max_drop must be a share of the validation set from 0 to below 1, got {self.max_drop}")
        if not 0 <= self.distil <= 1:
            raise ConfigError(f"distil must be a number from 0 to 1, got {self.distil}")
        if self.epochs is not None and self.epochs < 0:
            raise ConfigError(f"epochs must be at least 0, got {self.epochs}")
        if self.epochs == 0 and (self.bits is None or {self.keep_macs, self.zeros, self.max_drop} != {None}):
            raise ConfigError(
                "epochs=0 rounds the weights without a training: give bits, and keep_macs=null, which needs a training"
            )
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class _Trained:
    task: Task
    validation: dict[str, float]
    path: Path
    levels: dict[str, tuple[Tensor, Tensor]]
    callbacks: list[Callback]


def compress_checkpoint(path: Path, request: CompressionRequest) -> Comparison:
    """Trains a smaller model from a checkpoint, and compares it with the dense model, trained equally long.

    The checkpoint may come from an untrusted source. The directory of the results gets ``checkpoints/best.ckpt``,
    ``deploy.ckpt``, which is small, ``compression.json`` and ``report.html``.

    Args:
        path: a checkpoint of lightkit.train.
        request: the options.

    Raises:
        LightkitError: the checkpoint, its data or an option cannot be used, or no model keeps ``max_drop``.
    """
    request.check()
    directory = Path(request.output) if request.output is not None else path.with_name(f"{path.stem}-compressed")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"output={directory} holds files already; give another directory")
    native.start()
    job = _Job(path, request, directory)
    native.load()
    trials: list[dict[str, float]] = []
    models: dict[str, Any] = {"dense": job.restored.task}
    if request.compare and job.epochs > 0:
        # The dense model comes first: it is the better teacher after the same training.
        models["dense, trained on"] = job.train(None, None, directory / "dense", is_smaller=False).task
        job.teacher = models["dense, trained on"].model
    if job.epochs == 0:
        compressed = job.round()
    elif request.max_drop is None:
        compressed = job.train(request.keep_macs, request.zeros, directory / "checkpoints")
    else:
        compressed, trials = _search(job, request.max_drop)
    models["compressed"] = compressed.task
    columns = job.measure(models)
    checkpoint = load_checkpoint(compressed.path)
    sizes = write_deployed(checkpoint, compressed.levels, directory / "deploy.ckpt")
    columns["compressed"] |= {f"bytes {kind}": size for kind, size in sizes.items()}
    outcome = compression_outcome(compressed.callbacks, checkpoint, compressed.levels, sizes)
    comparison = Comparison(directory, columns, trials, outcome)
    run_files.write_json(directory / "compression.json", content(comparison, path, job.epochs))
    (directory / "report.html").write_text(page(comparison, path, job.epochs), encoding="utf-8")
    return comparison


class _Job:
    """The trainings from one checkpoint.

    Args:
        path: the checkpoint.
        request: the options.
        directory: the directory of the results.
    """

    def __init__(self, path: Path, request: CompressionRequest, directory: Path) -> None:
        self.path, self.request, self.directory = path, request, directory
        self.restored = self._restore()
        model = model_of(self.restored.task)
        if not isinstance(self.restored.task, Task) or model is None:
            raise ConfigError(f"{type(self.restored.task).__name__} is no task of lightkit.tasks with a model")
        if QUANTIZATION_KEY in self.restored.checkpoint:
            raise ConfigError(f"{path} is of a quantized model; compress the checkpoint of a model in float")
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

    def train(self, keep_macs: float | None, zeros: float | None, directory: Path, is_smaller: bool = True) -> _Trained:
        """Trains a copy of the dense model, and returns it with its best weights.

        Args:
            keep_macs: the share of the multiply-adds that is left; None leaves all.
            zeros: the share of zeros; None sets none.
            directory: the directory of the checkpoints.
            is_smaller: False trains the dense model.
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
        bits = self.request.bits if is_smaller else None
        if self.request.distil > 0 and is_smaller:
            is_value = isinstance(task, (ForecastTask, RegressionTask))
            targets = "values" if is_value else "classes"
            compression.append(Distil(copy.deepcopy(self.teacher), self.request.distil, targets=targets))
        if keep_macs is not None:
            compression.append(Prune(keep_macs, start=0.0, end=0.4))
        if zeros is not None:
            compression.append(Sparsify(zeros, start=0.2, end=0.7))
        if bits is not None:
            # The widths of the layers are final by then, and the ranges are measured anew at the end.
            start = 0.1 if keep_macs is None else 0.45
            compression.append(Quantize(bits, start=start, end=0.75))
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
            found = trainer.validate(task, datamodule=data, ckpt_path=path, verbose=False)
        levels = apply_quantization(task, load_checkpoint(path))
        return _Trained(task, dict(found[0]) if found else {}, Path(path), levels, compression)

    def round(self) -> _Trained:
        """Rounds the weights of a copy of the dense model, and measures the ranges of its layers' inputs."""
        assert self.request.bits is not None
        restored, data = self._restore(), self._build_data()
        task = restored.task
        assert isinstance(task, Task)
        data.prepare_data()
        data.setup("fit")
        loaded = itertools.islice(data.train_dataloader(), _CALIBRATION_BATCHES)
        # A Trainer without the data module would leave out its preparation of batches.
        batches: Any = [data.on_after_batch_transfer(batch, 0) for batch in loaded]

        def run() -> None:
            with lightning_errors_as_config_errors():
                self._trainer([]).validate(task, DataLoader(batches, batch_size=None), verbose=False)

        spec = calibrate(task, QuantizationScheme(self.request.bits), run)
        checkpoint = {**restored.checkpoint, QUANTIZATION_KEY: spec}
        levels = apply_quantization(task, checkpoint)
        path = self.directory / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        AtomicCheckpointIO(plain_hyperparameters=True).save_checkpoint(checkpoint, path)
        with lightning_errors_as_config_errors():
            found = self._trainer([]).validate(task, datamodule=data, verbose=False)
        return _Trained(task, dict(found[0]) if found else {}, path, levels, [Quantize(self.request.bits)])

    def validate(self) -> dict[str, float]:
        """Returns the metrics of the dense model on the validation set."""
        with lightning_errors_as_config_errors():
            found = self._trainer([]).validate(self.restored.task, datamodule=self._build_data(), verbose=False)
        return dict(found[0]) if found else {}

    def measure(self, tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns the test metrics, sizes and latencies of tasks by name."""
        columns: dict[str, dict[str, Any]] = {}
        models: dict[str, nn.Module] = {}
        inputs: list[tuple[Any, ...]] = []
        for name, task in tasks.items():
            model = model_of(task)
            assert model is not None
            recorder = TestRecorder()
            hook = model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
            with lightning_errors_as_config_errors():
                (metrics,) = self._trainer([recorder]).test(task, datamodule=self._build_data(), verbose=False)
            hook.remove()
            count = len(next(iter(recorder.result().values()), ()))
            columns[name] = {**metrics, "test samples": count}
            share = metrics.get(f"test/{ACCURACY}")
            if share is not None and count:
                columns[name]["interval"] = list(accuracy_interval(share, count))
            columns[name] |= {f"bytes {kind}": size for kind, size in bytes_of(model.state_dict()).items()}
            models[name] = model.eval()
        arguments = inputs[0] if inputs else None
        if arguments is None:
            return columns
        device = next((x.device for x in arguments if isinstance(x, torch.Tensor)), torch.device("cpu"))
        for name, model in models.items():
            columns[name]["multiply-adds"] = multiply_adds(model.to(device), arguments)
        for size in _BATCH_SIZES:
            if all(len(x) >= size for x in arguments if isinstance(x, torch.Tensor)):
                for name, value in latencies(models, arguments, size).items():
                    columns[name][f"ms at batch {size}"] = value
        return columns

    def _trainer(self, callbacks: Sequence[Callback]) -> pl.Trainer:
        return pl.Trainer(
            accelerator=self.request.accelerator,
            devices=1,
            max_epochs=max(1, self.epochs),
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


def _search(job: _Job, max_drop: float) -> tuple[_Trained, list[dict[str, float]]]:
    """Returns the smallest model whose validation accuracy has dropped by ``max_drop`` at most, by bisection.

    Raises:
        ConfigError: the task has no validation accuracy, or each model has lost more.
    """
    name = f"val/{ACCURACY}"
    dense = job.validate().get(name)
    if dense is None:
        raise ConfigError("max_drop needs a task with the metric accuracy, which this one has not")
    trials: list[dict[str, float]] = []
    best: tuple[int, _Trained] | None = None
    low, high = 0, len(_SHARES) - 1
    while low <= high:
        middle = (low + high + 1) // 2 if not trials else (low + high) // 2
        share = _SHARES[middle]
        trained = job.train(share, job.request.zeros, job.directory / f"keep_{share}")
        drop = dense - trained.validation[name]
        trials.append({"keep_macs": share, "drop": drop})
        print(f"keep_macs={share}: validation accuracy {trained.validation[name]:.4f}, {dense:.4f} dense", flush=True)
        # Rounding of float32 must not decide.
        if drop <= max_drop + 1e-6:
            best, low = (middle, trained), middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ConfigError(
            f"max_drop={max_drop}: each model has lost more; train longer with epochs=N, or allow a larger drop"
        )
    target = job.directory / "checkpoints"
    target.mkdir(parents=True, exist_ok=True)
    os.replace(best[1].path, target / "best.ckpt")
    return replace(best[1], path=target / "best.ckpt"), trials
