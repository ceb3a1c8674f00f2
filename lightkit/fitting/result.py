"""What `lightkit.fit` returns: a trained model that evaluates, predicts and saves, and `load`, which brings it back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightkit.checkpoints import CONFIG_KEY, AtomicCheckpointIO
from lightkit.compress.quantization import add_quantization
from lightkit.compress.widths import WIDTHS_KEY, changed_shapes, dense_shapes
from lightkit.data.arrays import DataModule, to_tensor
from lightkit.data.image_files import ImageFormat
from lightkit.data.images import ImageDataModule
from lightkit.data.tabular import TableDataModule
from lightkit.data.text import Text
from lightkit.errors import ConfigError
from lightkit.fitting.folders import are_files, file_batches, labelled_batches
from lightkit.fitting.trainer import make_trainer, quiet
from lightkit.models import Ensemble
from lightkit.models.description import describe
from lightkit.nn import CrossEntropyLoss
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask
from lightkit.tasks.batch_prediction import predict_batch

if TYPE_CHECKING:
    from lightkit.export.agreement import Agreement

# The key of a checkpoint with the metrics of each epoch.
HISTORY_KEY = "lightkit_history"

_EVAL_BATCH_SIZE = 500


class FitResult:
    """A trained model.

    Attributes:
        model: the model, a module of torch with the trained weights.
        history: the values of each epoch by metric: ``loss`` and ``accuracy`` of the training, ``val_loss`` and
            ``val_accuracy`` of the validation, and so on.
        task: the task of Lightning that trained the model.
        data: the data module of the training; of a loaded model it has no samples.
        classes: the names of the classes in the order of the model's outputs; None without classes.
        run_dir: the directory with logs, checkpoints and the report; None if ``fit`` has written none.
    """

    def __init__(
        self,
        task: pl.LightningModule,
        data: pl.LightningDataModule | None,
        history: dict[str, list[float]],
        run_dir: Path | None = None,
        metrics: dict[str, Any] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.task = task
        self.data = data
        self.history = history
        self.run_dir = run_dir
        # The configurations of the metrics, which a file keeps.
        self._metrics = metrics or {}
        # Height and width of the images that the model takes, where the data module does not say them.
        self._image_size = image_size

    @property
    def model(self) -> nn.Module:
        """The model with the trained weights."""
        model = getattr(self.task, "model", None)
        return model if isinstance(model, nn.Module) else self.task

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; None without classes."""
        return getattr(self.data, "classes", None)

    def evaluate(self, x: Any = None, y: Any = None, *, batch_size: int = _EVAL_BATCH_SIZE) -> dict[str, float]:
        """Returns the loss and the metrics on samples, by name such as ``accuracy``.

        Args:
            x: samples as in the training, or a torch Dataset; of images also a folder with a folder for each class, of
                which a test set is taken if it has sets. None takes the validation samples.
            y: their labels or targets; None if ``x`` has them, or is None.
            batch_size: the number of samples in a batch; it changes the speed only.

        Raises:
            DataError: the samples do not have the form of the training.
        """
        loader = self._loader(x, y, batch_size)
        with quiet():
            trainer = make_trainer(inference_mode=False)
            (metrics,) = trainer.test(self.task, loader, verbose=False)
        return {name.removeprefix("test/"): value for name, value in metrics.items()}

    @torch.inference_mode()
    def predict(self, x: Any, *, batch_size: int = _EVAL_BATCH_SIZE) -> np.ndarray:
        """Returns the predictions for samples: probabilities ``(N, classes)``, or values.

        Args:
            x: samples as in the training, or a torch Dataset, whose labels are ignored. For a series: histories
                ``(N, T)``; for images also an image file, a folder, of which all images below it are taken, sorted by
                name, or a list of both; for a language model: not supported, see
                `lightkit.tasks.LanguageModelTask.generate`.
            batch_size: the number of samples in a batch; it changes the speed only.

        Raises:
            DataError: the samples do not have the form of the training, or a file cannot be read.
        """
        was_training = self.task.training
        self.task.eval()
        try:
            parts = [predict_batch(self.task, batch) for batch in self._batches(x, batch_size)]
        finally:
            self.task.train(was_training)
        return torch.cat(parts).cpu().numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, and what predictions need, to one file, which `load` reads.

        The file is a Lightning checkpoint, which loads with ``weights_only=True``. It has no code: for a model of one's
        own class, `load` needs an instance.

        Raises:
            ConfigError: the model is an ensemble, whose members have files of their own.
        """
        if isinstance(self.model, (Ensemble, nn.ModuleList)):
            raise ConfigError("an ensemble has no file of its own: lightkit.load takes the list of its members' files")
        weights = self.task.state_dict()
        if "loss" not in (config := self._config())["task"]:
            # A loss of the user's own is not described.
            weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
        checkpoint = {
            "state_dict": weights,
            "pytorch-lightning_version": pl.__version__,
            "epoch": len(next(iter(self.history.values()), [])),
            "global_step": 0,
            CONFIG_KEY: config,
            HISTORY_KEY: self.history,
        }
        if changed := changed_shapes(self.task, dense_shapes(self.task)):
            checkpoint[WIDTHS_KEY] = changed
        add_quantization(self.task, checkpoint)
        if isinstance(self.data, (ImageDataModule, TableDataModule)):
            checkpoint[type(self.data).__qualname__] = self.data.state_dict()
        AtomicCheckpointIO().save_checkpoint(checkpoint, str(path))

    def export(self, path: str | os.PathLike[str], x: Any = None, *, batch_size: int = _EVAL_BATCH_SIZE) -> Agreement:
        """Writes the model to a file that other programs run, and compares the file with the model on samples.

        The file has the operations and the weights in float32, the names of the classes, the preprocessing and the
        configuration of the data; it has no path, no source line and no sample. ``lightkit.load``,
        ``python -m lightkit.evaluate`` and ``python -m lightkit.predict`` take it in the place of a checkpoint.

        Args:
            path: the file, whose suffix decides on the format: see `lightkit.export.FORMATS`.
            x: samples as for `predict`; None takes the validation samples.
            batch_size: the number of samples in a batch; it changes the speed only.

        Returns:
            How far the file and the model agree: the number of labels that differ, and the errors.

        Raises:
            CheckpointError: the file would compute something else than the model, beyond rounding; it is not kept.
            ConfigError: the model cannot be exported, a package is missing, or there are no samples.
            DataError: the samples do not have the form of the training.
        """
        from lightkit.app.exporting import export_task

        state = {}
        if isinstance(self.data, ImageDataModule) and self._image_size is not None:
            state = {type(self.data).__qualname__: {"image_shape": list(self._image_size)}}
        elif isinstance(self.data, (ImageDataModule, TableDataModule)):
            state = {type(self.data).__qualname__: self.data.state_dict()}
        batches = self._loader(None, None, batch_size) if x is None else self._unlabelled(x, batch_size)
        return export_task(self.task, self.data, self._config(), state, batches, Path(path))

    def serve(self, **settings: Any) -> None:
        """Answers requests by HTTP until Ctrl-C or SIGTERM, and prints the address.

        The model predicts in a thread of this process, on the device on which it is. ``lightkit.serve.serve`` takes a
        file, for which it starts processes; `lightkit.serve.Server` serves in the background.

        Args:
            **settings: the fields of a `lightkit.serve.ServerSettings`, such as ``port=8000``.

        Raises:
            ConfigError: a setting is wrong, a package is missing, or the address is in use.
        """
        from lightkit.app.serving import serve

        serve(self, **settings)

    def _unlabelled(self, x: Any, batch_size: int) -> Iterator[Any]:
        """Yields batches of samples as tasks take them, whose labels are ignored."""
        for batch in self._batches(x, batch_size):
            yield batch if isinstance(batch, tuple) else (batch, batch)

    def _config(self) -> dict[str, Any]:
        """Returns the configuration from which `lightkit.app.restore` builds the task and the data module."""
        task: dict[str, Any] = {"_target_": f"lightkit.tasks.{type(self.task).__name__}"}
        loss = getattr(self.task, "loss", None)
        if type(loss) is CrossEntropyLoss:
            weight = None if loss.weight is None else loss.weight.tolist()
            task["loss"] = {"_target_": "lightkit.nn.CrossEntropyLoss", "weight": weight}
        if self._metrics:
            task["metrics"] = self._metrics
        if isinstance(self.task, RegressionTask):
            task["num_targets"] = self.task.num_targets
        if isinstance(self.task, ForecastTask):
            task |= {"horizon": self.task.horizon, "relative": self.task.relative, "level": self.task.level}
        if not isinstance(self.task, (ClassificationTask, RegressionTask, ForecastTask, LanguageModelTask)):
            cls = type(self.task)
            task = {"_target_": f"{cls.__module__}.{cls.__qualname__}"}
        cls = type(self.model)
        is_pruned = bool(changed_shapes(self.task, dense_shapes(self.task)))
        model = describe(self.model, is_pruned) or {"_target_": f"{cls.__module__}.{cls.__qualname__}"}
        data: dict[str, Any] = {}
        cls = type(self.data)
        if (arguments := getattr(self.data, "hyperparameters", None)) is not None:
            data = {"_target_": f"lightkit.data.{cls.__name__}", **arguments}
        return {"task": task, "model": model, "data": data, "trainer": {}}

    def _loader(self, x: Any, y: Any, batch_size: int) -> Any:
        if x is None:
            if self.data is None or not hasattr(self.data, "val_dataloader"):
                raise ConfigError("evaluate() needs x and y")
            try:
                loader = self.data.val_dataloader()
            except RuntimeError as error:
                raise ConfigError("evaluate() needs x: a loaded model has no samples of its training") from error
            if isinstance(loader, list) and not loader:
                raise ConfigError("evaluate() needs x: the training held out no samples")
            return _Converted(self.data, loader)
        if isinstance(x, Dataset):
            return DataLoader(x, batch_size)
        if isinstance(self.data, TableDataModule):
            if y not in (None, self.data.target):
                raise ConfigError(f"evaluate() of a table takes y from its column {self.data.target!r}; leave y out")
            return _Converted(self.data, _slices(self.data.encode(x, with_target=True), batch_size))
        if isinstance(self.data, ImageDataModule) and are_files(x):
            if y is not None:
                raise ConfigError(f"evaluate() of a folder takes y from the names of its folders; leave y out of {x}")
            return _Converted(self.data, labelled_batches(x, self.data, self.image_format(), batch_size))
        if not isinstance(self.data, DataModule):
            raise ConfigError(f"evaluate() of a model that was trained on {type(self.data).__name__} takes no arrays")
        if y is None:
            raise ConfigError("evaluate(x) needs y too")
        return _Converted(self.data, _slices(self.data.encode(x, y), batch_size))

    def _batches(self, x: Any, batch_size: int) -> Iterator[Any]:
        if isinstance(x, Dataset):
            for batch in DataLoader(x, batch_size):
                yield batch[0] if isinstance(batch, (tuple, list)) else batch
        elif isinstance(self.data, TableDataModule):
            # The last entry of a batch is the labels, which a prediction ignores.
            yield from ((*inputs, inputs[0]) for inputs in _slices(self.data.encode(x), batch_size))
        elif isinstance(self.data, DataModule):
            for (part,) in _slices(self.data.encode(x), batch_size):
                yield self.data.to_input(part)
        elif isinstance(self.data, ImageDataModule) and are_files(x):
            for part in file_batches(x, self.image_format(), batch_size):
                yield self.data.to_input(part)
        elif (to_input := getattr(self.data, "to_input", None)) is not None:
            # A data module of lightkit.train.
            for part in to_tensor(x).split(batch_size):
                yield to_input(part)
        elif isinstance(self.task, ForecastTask):
            for part in to_tensor(x).double().split(batch_size):
                yield part.reshape(len(part), -1, 1)
        else:
            for part in to_tensor(x).split(batch_size):
                yield part

    def image_format(self) -> ImageFormat:
        """Returns the format into which predictions convert image files; the model must be one of images."""
        form = cast("ImageDataModule", self.data).image_format()
        return form if self._image_size is None else replace(form, size=self._image_size)


class _Converted:
    """A loader whose batches a data module converts to a model's inputs, for a Trainer without that data module."""

    def __init__(self, data: Any, loader: Any) -> None:
        self._data = data
        self._batches = list(loader) if isinstance(loader, Iterator) else loader

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            is_raw = isinstance(self._data, (DataModule, ImageDataModule, Text))
            yield self._data.on_after_batch_transfer(batch, 0) if is_raw else batch


def _slices(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {size}")
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def load(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: nn.Module | None = None,
    trust: bool = False,
) -> FitResult:
    """Returns the model of a file that `FitResult.save`, ``python -m lightkit.train`` or an export has written.

    The file is not trusted: it makes lightkit compute, and nothing else.

    Args:
        path: the file; the directory of a run, whose best checkpoint it names, of a run with ``kfold`` or of a sweep;
            or a list of these. Several models become an ensemble, which predicts the mean of their probabilities or
            values: see `lightkit.tasks.ensemble`.
        model: a model of the class that was trained, whose weights the function replaces. None builds the model that
            the file describes: one of lightkit's, or a ``torch.nn.Sequential`` of torch's layers.
        trust: allow exports in a format in which a file can run code: see `lightkit.export.open_export`.

    Raises:
        CheckpointError: a file is missing or damaged, or describes no model and ``model`` is None; or the models do not
            go together: they have other tasks, classes or forms of samples.
        ConfigError: the list is empty, or ``model`` is given for several files.
    """
    from lightkit.app.ensembles import combine, members_of, restore_members
    from lightkit.app.image_sizes import picture_size
    from lightkit.app.parts import model_of
    from lightkit.app.restore import restore

    given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    paths = [member for part in given for member in members_of(Path(part).expanduser())]
    if not paths:
        raise ConfigError("path must name at least one file, got an empty list")
    if model is not None and len(paths) > 1:
        raise ConfigError(
            f"model goes with one file, and path names {len(paths)}: load each of them, and combine the "
            "attributes task by lightkit.tasks.ensemble"
        )
    with quiet():
        if len(paths) > 1:
            restored = combine(restore_members(paths, for_evaluation=True, trust=trust))
        else:
            restored = restore(paths[0], for_evaluation=True, model=model, trust=trust)
        data = restored.build_data() if restored.config.get("data") else None
        size = None
        if isinstance(data, ImageDataModule):
            size = picture_size(data, model_of(restored.task), restored.checkpoint.get(type(data).__qualname__))
    history = restored.checkpoint.get(HISTORY_KEY) if len(paths) == 1 else None
    return FitResult(restored.task, data, history if isinstance(history, dict) else {}, image_size=size)
