"""``lightkit.fit``: the training of a model on samples in memory, in one call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightkit.callbacks import AveragedWeights, Progress
from lightkit.data.arrays import DataModule
from lightkit.data.batches import after_setup
from lightkit.data.images import ImageDataModule
from lightkit.data.series import SeriesDataModule
from lightkit.data.tabular import TableDataModule
from lightkit.data.text import Text
from lightkit.errors import ConfigError
from lightkit.fitting import choices
from lightkit.fitting.folders import check_path, is_folder, make_folder
from lightkit.fitting.result import FitResult
from lightkit.fitting.run_directory import RunDirectory
from lightkit.fitting.samples import DatasetModule, make_data, probe
from lightkit.fitting.tables import is_table, make_mlp, make_table
from lightkit.fitting.trainer import History, interruptible, make_trainer, quiet, seeded
from lightkit.loggers import CSVLogger
from lightkit.models import LanguageModel
from lightkit.nn import CrossEntropyLoss
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask

# The optimizer of the last fit of a model, from which the next fit goes on.
_earlier: weakref.WeakKeyDictionary[nn.Module, _Earlier] = weakref.WeakKeyDictionary()


def fit(
    model: nn.Module | str,
    x: Any,
    y: Any = None,
    *,
    epochs: int = 5,
    batch_size: int = 32,
    optimizer: Any = "adam",
    loss: Any = None,
    metrics: Any = None,
    validation: Any = 0.1,
    class_weight: Any = None,
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    history: int | None = None,
    callbacks: Sequence[Callback] = (),
    verbose: bool = True,
) -> FitResult:
    """Trains a model and returns a `FitResult`, which evaluates, predicts and saves.

    ``lightkit.fit(model, images, labels, epochs=5)`` trains on lightkit's kernels in a Trainer of Lightning. Ctrl-C
    ends the training and returns what is trained so far. A second call with the same model goes on: with the weights,
    and with the state of the optimizer if it is of the same class.

    Args:
        model: a ``torch.nn.Module`` that returns logits ``(N, C)`` for classes, or values ``(N)`` or ``(N, K)`` for
            targets of floating point, or a ``LightningModule`` with a training step of its own. The names ``"cnn"``,
            ``"mlp"`` and ``"rnn"`` make a model that fits the samples.
        x: the samples: images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``, uint8 from 0 to 255 or floating
            point that is taken as it is; sequences ``(N, T, F)``; rows of numbers ``(N, F)``; tokens, integers
            ``(N, T)``; texts; a series ``(T)``; a torch Dataset of pairs; a folder of images with a folder for each
            class, see `lightkit.data.ImageFolder`; a data module; or a table: a ``pandas.DataFrame`` or the path of a
            .csv or .xlsx file, see `lightkit.data.TableDataModule`. A layout that the model does not take is not tried
            in the training: the first one that fits is found before.
        y: labels (integers, texts or one-hot rows) or targets (floating point); of a table the name of the column to
            predict. None for a series, for a text that a language model learns, for a Dataset, a folder of images and
            a data module.
        epochs: the number of passes through the training samples.
        batch_size: the number of samples in a batch.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``, a class such as ``torch.optim.RMSprop``, a function of the
            parameters, or an optimizer of the model's parameters.
        loss: ``"cross_entropy"``, ``"mse"``, ``"mae"``, ``"huber"``, a module, or a function of outputs and labels.
            None takes cross-entropy for classes, and else the mean squared error.
        metrics: names such as ``["accuracy", "f1"]``, or metrics of torchmetrics.
        validation: the share of the samples that is held out, or a pair of arrays; 0 for none. A folder of images may
            have a folder ``val``, which a share above 0 does not change; another folder takes its place.
        class_weight: ``"balanced"``, a weight for each class, or weights by class.
        seed: the seed of the order of the samples, and of dropout.
        run_dir: a directory for ``metrics.csv``, checkpoints and ``report.html``; None writes nothing.
        history: the number of values or bytes from which a model of a series or text predicts.
        callbacks: further callbacks of the Trainer.
        verbose: print a line for each epoch, or a bar on a terminal.

    Raises:
        LightkitError: the samples or an argument cannot be used; the message says what was expected.
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ConfigError(f"epochs must be a whole number of at least 1, got {epochs!r}")
    earlier = _earlier.get(model) if isinstance(model, nn.Module) else None
    # A second fit sees other orders of the samples than the first one.
    order = seed + (earlier.epochs if earlier is not None else 0)
    if isinstance(model, nn.Module):
        # An earlier fit has left the model in evaluation mode.
        model.train()
    if y is None and not is_folder(x):
        check_path(model, x)
    with seeded(seed), quiet():
        if is_folder(x):
            data: pl.LightningDataModule = make_folder(model, x, y, validation, batch_size, order)
        elif is_table(x):
            data = make_table(x, y, validation, batch_size, order, loss, class_weight)
        else:
            data = make_data(model, x, y, validation, batch_size, order, history)
        if isinstance(data, (ImageDataModule, TableDataModule)):
            data.prepare_data()
            data.setup("fit")
        model = _named_model(model, data) if isinstance(model, str) else model
        task, nodes = _make_task(model, data, optimizer, loss, metrics, class_weight)
        record, keeper = History(), _KeepOptimizer(earlier)
        settings = {"epochs": epochs, "batch_size": batch_size, "optimizer": str(optimizer), "seed": seed}
        run = None if run_dir is None else RunDirectory(Path(run_dir), data, settings)
        trainer = make_trainer(
            max_epochs=epochs,
            callbacks=[
                *([Progress()] if verbose else []),
                *(record, keeper, AveragedWeights(), *callbacks),
                *(run.callbacks() if run is not None else []),
            ],
            enable_checkpointing=run is not None,
            logger=False if run is None else CSVLogger(run.path, name="", version=""),
            default_root_dir=None if run is None else run.path,
        )
        with interruptible():
            trainer.fit(task, datamodule=data)
    result = FitResult(task, data, record.sorted_values(), None if run is None else run.path, nodes)
    if isinstance(model, nn.Module) and keeper.optimizer is not None:
        done = (earlier.epochs if earlier is not None else 0) + trainer.current_epoch
        _earlier[model] = _Earlier(type(keeper.optimizer), keeper.optimizer.state_dict(), done)
    task.eval()
    if run is not None:
        result.save(run.path / "model.ckpt")
        with quiet():
            run.write_report(trainer, task, {name: values[-1] for name, values in result.history.items()})
    return result


def _named_model(name: str, data: pl.LightningDataModule) -> Any:
    """Returns the model of a name for the samples of a data module; the name itself if nothing is known of them."""
    if isinstance(data, TableDataModule):
        return make_mlp(name, data)
    if isinstance(data, ImageDataModule):
        inputs = data.to_input(torch.zeros(1, *data.stored_shape(), dtype=torch.uint8))
        return choices.find_model(name, inputs.shape[1:], data.num_classes)
    if isinstance(data, DataModule):
        x, y = data.parts["train"]
        outputs = data.num_classes or y.reshape(len(y), -1).shape[1]
        return choices.find_model(name, data.to_input(x[:1]).shape[1:], outputs)
    return name


def _make_task(
    model: Any, data: pl.LightningDataModule, optimizer: Any, loss: Any, metrics: Any, class_weight: Any
) -> tuple[pl.LightningModule, dict[str, Any]]:
    """Returns the task of a model, and the configurations of its metrics by name."""
    if isinstance(model, pl.LightningModule) and type(model).training_step is not pl.LightningModule.training_step:
        given = {"loss": loss, "metrics": metrics, "class_weight": class_weight}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{unused[0]}: a LightningModule has its own")
        return model, {}
    make, loss_module = choices.find_optimizer(optimizer, model), choices.find_loss(loss)
    if isinstance(data, SeriesDataModule):
        found, nodes = choices.find_metrics(metrics, None)
        return ForecastTask(model, data.horizon, make, loss=loss_module, metrics=found), nodes
    if isinstance(data, Text):
        if not isinstance(model, LanguageModel):
            raise ConfigError(
                f"a text without labels takes a lightkit.models.LanguageModel, such as RNNLanguageModel, got "
                f"{type(model).__name__}"
            )
        return LanguageModelTask(model, make), {}
    labels, outputs = _first_labels(model, data)
    classes = getattr(data, "classes", None)
    if classes is None and labels.is_floating_point():
        if class_weight is not None:
            raise ConfigError("class_weight is for labels, and y has numbers")
        targets = 1 if labels.dim() == 1 else labels.shape[1]
        found, nodes = choices.find_metrics(metrics, None)
        return RegressionTask(model, targets, make, loss=loss_module, metrics=found), nodes
    count = _check_logits(outputs, len(classes) if classes is not None else None)
    if class_weight is not None:
        counted = _training_labels(data)
        if counted is None or classes is None or loss_module is not None:
            raise ConfigError("class_weight goes with arrays, folders of images or tables, and the default loss")
        loss_module = CrossEntropyLoss(weight=choices.class_weights(class_weight, counted, classes))
    found, nodes = choices.find_metrics(metrics, count)
    return ClassificationTask(model, make, loss=loss_module, metrics=found), nodes


def _training_labels(data: pl.LightningDataModule) -> Tensor | None:
    """Returns the labels of the training samples, ``(N)``; None if the data module does not have them at once."""
    if isinstance(data, ImageDataModule):
        return after_setup(data.train).labels
    if isinstance(data, TableDataModule):
        return data.training_labels()
    return data.parts["train"][1] if isinstance(data, DataModule) else None


def _first_labels(model: nn.Module, data: pl.LightningDataModule) -> tuple[Tensor, Tensor]:
    """Returns labels or targets of the first samples, and the outputs of the model for these samples."""
    if isinstance(data, DataModule):
        x, labels = (tensor[:2] for tensor in data.parts["train"])
        return labels, probe(model, data.to_input(x))
    if isinstance(data, TableDataModule):
        *inputs, labels = (tensor[:2] for tensor in next(iter(data.train_dataloader())))
        return labels, probe(model, *inputs)
    if isinstance(data, ImageDataModule):
        part = after_setup(data.train)
        images = torch.stack([part.images[index] for index in range(min(2, len(part)))])
        return part.labels[:2], probe(model, data.to_input(images))
    loader = DatasetModule(data.train, 0, 2, 0).val_dataloader() if isinstance(data, DatasetModule) else None
    batch = next(iter(loader or data.train_dataloader()))
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ConfigError("a sample of x must be a pair of an input and a label or target")
    return torch.as_tensor(batch[1]), probe(model, batch[0])


def _check_logits(outputs: Tensor, classes: int | None) -> int:
    """Returns the number of classes, after a check that the model returns as many logits.

    Args:
        outputs: the outputs of the model for a few samples.
        classes: the number of classes of the data; None if it is unknown.

    Raises:
        ConfigError: the outputs are no logits of so many classes.
    """
    shape = tuple(outputs.shape[1:])
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ConfigError(
            f"the model must return one logit for each class, (N, C), got (N, {', '.join(map(str, shape))})"
        )
    if classes is not None and outputs.shape[1] != classes:
        raise ConfigError(f"the model returns {outputs.shape[1]} logits, and y has {classes} classes")
    if bool((outputs >= 0).all()) and torch.allclose(
        outputs.sum(dim=1), torch.ones(len(outputs)).to(outputs), atol=1e-4
    ):
        raise ConfigError(
            "the model's outputs are probabilities; leave the softmax at its end out: the loss takes logits, and "
            "predict returns probabilities"
        )
    return outputs.shape[1]


class _Earlier:
    """The state of the optimizer after the last fit of a model.

    Args:
        cls: the class of the optimizer.
        state: its state dict.
        epochs: the number of epochs of all fits so far.
    """

    def __init__(self, cls: type[Optimizer], state: dict[str, Any], epochs: int) -> None:
        self.cls, self.state, self.epochs = cls, state, epochs


class _KeepOptimizer(Callback):
    """Begins with the state of an earlier optimizer of the same class and parameters, and keeps the optimizer.

    Attributes:
        optimizer: the optimizer of the training; None before it, and for several.
    """

    def __init__(self, earlier: _Earlier | None) -> None:
        self._earlier = earlier
        self.optimizer: Optimizer | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the earlier state, except the hyperparameters, which are those of this training."""
        if len(trainer.optimizers) != 1:
            return
        (self.optimizer,) = trainer.optimizers
        if self._earlier is None or type(self.optimizer) is not self._earlier.cls or self.optimizer.state:
            return
        own = self.optimizer.state_dict()
        indices = [[group["params"] for group in state["param_groups"]] for state in (own, self._earlier.state)]
        if indices[0] == indices[1]:
            self.optimizer.load_state_dict({**self._earlier.state, "param_groups": own["param_groups"]})
