"""Optimizers, losses, metrics and models that `lightkit.fit` takes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightkit.config import build
from lightkit.errors import ConfigError
from lightkit.models import CNN, MLP, RNN
from lightkit.nn import CrossEntropyLoss, MSELoss
from lightkit.optim import SGD, Adam, AdamW
from lightkit.targets import nearest

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adam": partial(Adam, lr=0.001),
    "adamw": partial(AdamW, lr=0.001),
    "sgd": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
}

_LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": CrossEntropyLoss,
    "mse": MSELoss,
    "mae": nn.L1Loss,
    "huber": nn.HuberLoss,
}

# The configuration of each metric; those of classes take the number of classes, too.
_CLASS_METRICS: dict[str, dict[str, Any]] = {
    "accuracy": {"_target_": "torchmetrics.classification.MulticlassAccuracy", "average": "micro"},
    "f1": {"_target_": "torchmetrics.classification.MulticlassF1Score", "average": "macro"},
    "precision": {"_target_": "torchmetrics.classification.MulticlassPrecision", "average": "macro"},
    "recall": {"_target_": "torchmetrics.classification.MulticlassRecall", "average": "macro"},
    "auroc": {"_target_": "torchmetrics.classification.MulticlassAUROC"},
}
_VALUE_METRICS: dict[str, dict[str, Any]] = {
    "mae": {"_target_": "torchmetrics.regression.MeanAbsoluteError"},
    "rmse": {"_target_": "torchmetrics.regression.MeanSquaredError", "squared": False},
    "mse": {"_target_": "torchmetrics.regression.MeanSquaredError"},
    "r2": {"_target_": "torchmetrics.regression.R2Score"},
}


def find_optimizer(optimizer: Any, model: nn.Module) -> OptimizerFactory:
    """Returns a function that makes the optimizer of a model's parameters.

    Args:
        optimizer: a name, a class or function of torch's signature, or an optimizer of the model's parameters.
        model: the model.

    Raises:
        ConfigError: the name is unknown, or the optimizer has parameters of another model.
    """
    if isinstance(optimizer, str):
        return _by_name("optimizer", optimizer, _OPTIMIZERS)
    if isinstance(optimizer, Optimizer):
        own = {id(parameter) for parameter in model.parameters()}
        if not all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError("optimizer has parameters that are not the model's")
        return lambda parameters: optimizer
    if callable(optimizer):
        return cast("OptimizerFactory", optimizer)
    raise ConfigError(f"optimizer must be a name, a class or an optimizer of torch, got {type(optimizer).__name__}")


def find_loss(loss: Any) -> nn.Module | None:
    """Returns the loss as a module; None for None, which stands for the loss of the task.

    Args:
        loss: a name, a module, or a function of outputs and labels or targets.
    """
    if loss is None or isinstance(loss, nn.Module):
        return loss
    if isinstance(loss, str):
        return _by_name("loss", loss, _LOSSES)()
    if callable(loss):
        return _FunctionLoss(cast("Callable[[Tensor, Tensor], Tensor]", loss))
    raise ConfigError(f"loss must be a name, a module or a function, got {type(loss).__name__}")


def find_metrics(metrics: Any, num_classes: int | None) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Returns metrics by name, and the configurations of those that have one.

    Args:
        metrics: names, metrics of torchmetrics, or a mapping of either by name; None takes the accuracy, or the mean
            absolute and the root mean squared error.
        num_classes: the number of classes; None for targets of floating point.
    """
    known = _VALUE_METRICS
    if num_classes is not None:
        known = {name: {**node, "num_classes": num_classes} for name, node in _CLASS_METRICS.items()}
    if metrics is None:
        metrics = ["accuracy"] if num_classes is not None else ["mae", "rmse"]
    if not isinstance(metrics, Mapping):
        listed = [metrics] if isinstance(metrics, (str, Metric)) else metrics
        metrics = {metric if isinstance(metric, str) else type(metric).__name__: metric for metric in listed}
    nodes = {name: _by_name("metrics", m, known) for name, m in metrics.items() if isinstance(m, str)}
    return {name: build(nodes[name]) if name in nodes else m for name, m in metrics.items()}, nodes


def class_weights(weight: Any, labels: Tensor, classes: Sequence[str]) -> Tensor | None:
    """Returns the weight of each class in the loss, float32 ``(C)``; None for None.

    Args:
        weight: ``"balanced"`` for ``N / (C * count of the class)``, a weight for each class, or a mapping of weights by
            the name or the number of a class, in which a class that is missing has the weight 1.
        labels: the training labels, int64 ``(N)``.
        classes: the names of the C classes.

    Raises:
        ConfigError: the number of weights differs, a class is unknown, or a weight is negative or no number.
    """
    if weight is None:
        return None
    count = len(classes)
    if isinstance(weight, str):
        _by_name("class_weight", weight, {"balanced": None})
        counts = labels.bincount(minlength=count)
        if (missing := (counts == 0).nonzero().flatten().tolist()) != []:
            raise ConfigError(f"class_weight=balanced: the training has no sample of class {classes[missing[0]]}")
        return (len(labels) / (count * counts)).float()
    if isinstance(weight, Mapping):
        # A number names the class whose name is its text.
        given = {str(name): value for name, value in weight.items()}
        if unknown := [name for name in given if name not in classes]:
            raise ConfigError(f"class_weight has no class {unknown[0]!r}{nearest(unknown[0], list(classes))}")
        weight = [given.get(name, 1.0) for name in classes]
    values = torch.as_tensor(weight, dtype=torch.float32)
    if values.shape != (count,) or not values.isfinite().all() or (values < 0).any():
        raise ConfigError(f"class_weight must be {count} finite weights of at least 0, got {values.tolist()}")
    return values


def find_model(model: Any, shape: Sequence[int], outputs: int) -> nn.Module:
    """Returns the model; makes it if ``model`` is a name.

    Args:
        model: a module, or ``"cnn"``, ``"mlp"`` or ``"rnn"``.
        shape: the shape of a sample as the model's input, such as ``(C, H, W)``.
        outputs: the number of values that the model returns for a sample.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str):
        raise ConfigError(f"model must be a torch.nn.Module or a name, got {type(model).__name__}")
    makers = {"cnn": _make_cnn, "mlp": _make_mlp, "rnn": _make_rnn}
    return _by_name("model", model, makers)(tuple(shape), outputs)


def _make_cnn(shape: tuple[int, ...], outputs: int) -> nn.Module:
    if len(shape) != 3:
        raise ConfigError(f"model='cnn' takes images, got samples of shape {shape}")
    try:
        return CNN(in_channels=shape[0], num_classes=outputs, image_size=shape[1:])
    except ValueError as error:
        raise ConfigError(f"model='cnn': {error}") from error


def _make_mlp(shape: tuple[int, ...], outputs: int) -> nn.Module:
    size = int(torch.Size(shape).numel())
    return MLP(size, outputs)


def _make_rnn(shape: tuple[int, ...], outputs: int) -> nn.Module:
    if len(shape) == 3 and shape[0] == 1:
        # The rows of a grey image are a sequence.
        return nn.Sequential(nn.Flatten(1, 2), RNN(shape[2], 128, outputs))
    if len(shape) != 2:
        raise ConfigError(f"model='rnn' takes sequences (N, T, F) or grey images, got samples of shape {shape}")
    return RNN(shape[1], 128, outputs)


def _by_name(argument: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ConfigError(f"{argument}={name!r} is none of {', '.join(known)}{nearest(name, list(known))}")
    return known[name]


class _FunctionLoss(nn.Module):
    """A loss module of a function of outputs and labels or targets."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.function(outputs, labels)
