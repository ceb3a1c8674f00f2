"""Construction of objects from the configuration in an untrusted checkpoint.

For each role (``model``, ``task``, ``loss``, ``metric``, ``data``) the module lists the exact public classes that a
checkpoint may name. The constructors of these classes only compute. Their arguments must be plain values: the module
rejects a class within a class and resolves no interpolation. A new capability adds its classes to their roles. Packages
that the user names with ``LIGHTKIT_TARGETS`` or `lightkit.config.allow_targets` are allowed in every role and within
each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightkit._util.printable import printable
from lightkit.config import construct
from lightkit.errors import CheckpointError, ConfigError
from lightkit.targets import check_arguments, find_class, is_in_user_package, nearest

ALLOWED_CLASSES: dict[str, tuple[str, ...]] = {
    "model": (
        "lightkit.models.CNN",
        "lightkit.models.MLP",
        "lightkit.models.RNN",
        "lightkit.models.RNNLanguageModel",
        "lightkit.models.Transformer",
    ),
    "task": (
        "lightkit.tasks.ClassificationTask",
        "lightkit.tasks.ForecastTask",
        "lightkit.tasks.LanguageModelTask",
        "lightkit.tasks.RegressionTask",
    ),
    "loss": (
        "lightkit.nn.BCEWithLogitsLoss",
        "lightkit.nn.CrossEntropyLoss",
        "lightkit.nn.MSELoss",
        "torch.nn.BCEWithLogitsLoss",
        "torch.nn.CrossEntropyLoss",
        "torch.nn.HuberLoss",
        "torch.nn.L1Loss",
        "torch.nn.MSELoss",
        "torch.nn.SmoothL1Loss",
    ),
    "metric": (
        "torchmetrics.classification.MulticlassAUROC",
        "torchmetrics.classification.MulticlassAccuracy",
        "torchmetrics.classification.MulticlassAveragePrecision",
        "torchmetrics.classification.MulticlassCohenKappa",
        "torchmetrics.classification.MulticlassConfusionMatrix",
        "torchmetrics.classification.MulticlassF1Score",
        "torchmetrics.classification.MulticlassFBetaScore",
        "torchmetrics.classification.MulticlassJaccardIndex",
        "torchmetrics.classification.MulticlassMatthewsCorrCoef",
        "torchmetrics.classification.MulticlassPrecision",
        "torchmetrics.classification.MulticlassRecall",
        "torchmetrics.classification.MulticlassSpecificity",
        "torchmetrics.regression.ExplainedVariance",
        "torchmetrics.regression.MeanAbsoluteError",
        "torchmetrics.regression.MeanAbsolutePercentageError",
        "torchmetrics.regression.MeanSquaredError",
        "torchmetrics.regression.MeanSquaredLogError",
        "torchmetrics.regression.PearsonCorrCoef",
        "torchmetrics.regression.R2Score",
        "torchmetrics.regression.SymmetricMeanAbsolutePercentageError",
        "torchmetrics.regression.WeightedMeanAbsolutePercentageError",
    ),
    "data": (
        "lightkit.data.CO2",
        "lightkit.data.DataModule",
        "lightkit.data.FashionMNIST",
        "lightkit.data.ImageFolder",
        "lightkit.data.MNIST",
        "lightkit.data.MNIST5k",
        "lightkit.data.Series",
        "lightkit.data.Sunspots",
        "lightkit.data.TableDataModule",
        "lightkit.data.Text",
    ),
}

_TARGET = "_target_"

# A model of torch's layers: `lightkit.models.description` has the list of the layers.
_SEQUENTIAL = "torch.nn.Sequential"

# Limits of a configuration; lightkit's own have some 150 values in four levels.
_MAX_VALUES, _MAX_DEPTH, _MAX_CHARACTERS, _INTEGER_LIMIT = 10_000, 12, 4096, 2**63

# Limits of metrics: their number, the characters of a name, and a numeric argument such as a number of classes.
_MAX_METRICS, _MAX_NAME_LENGTH, _MAX_METRIC_ARGUMENT = 50, 100, 1000


def check_plain(config: Any) -> None:
    """Rejects a checkpoint's configuration that is not a bounded tree of plain values.

    Args:
        config: the configuration, as the checkpoint has it.

    Raises:
        CheckpointError: the configuration holds an object or a key of a type that is not plain, or it exceeds a limit
            of values, levels, characters or bits.
    """
    count = 0
    pending = [(config, 0)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_VALUES:
            raise CheckpointError(
                "the configuration in the checkpoint is nested too deep or too large: at most "
                f"{_MAX_DEPTH} levels and {_MAX_VALUES} values are read"
            )
        if type(value) is dict:
            pending += [(part, depth + 1) for pair in value.items() for part in pair]
            if not all(type(key) in (str, int) for key in value):
                raise CheckpointError("the configuration in the checkpoint has a key that is no text and no number")
        elif type(value) is list:
            pending += [(part, depth + 1) for part in value]
        elif type(value) is str:
            if len(value) > _MAX_CHARACTERS:
                raise CheckpointError(f"the configuration in the checkpoint has a text of {len(value):,} characters")
        elif type(value) is int:
            if not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
                raise CheckpointError("the configuration in the checkpoint has a number beyond 64 bits")
        elif value is not None and type(value) not in (bool, float):
            raise CheckpointError(f"the configuration in the checkpoint holds a {type(value).__name__}")


def build(role: str, node: Any, **extra: Any) -> Any:
    """Builds the object that a checkpoint describes for a role.

    Args:
        role: a key of `ALLOWED_CLASSES`.
        node: the configuration of the object: ``_target_`` and plain arguments.
        **extra: the caller's arguments, which replace the checkpoint's.

    Raises:
        CheckpointError: the role does not allow the class, or the class rejects the arguments.
    """
    if type(node) is not dict or type(node.get(_TARGET)) is not str:
        raise CheckpointError(f"the configuration in the checkpoint names no class in {role}._target_")
    target = node[_TARGET]
    if role == "model" and target == _SEQUENTIAL:
        return _build_sequential(node)
    arguments = {name: value for name, value in node.items() if name not in (_TARGET, "_partial_", *extra)}
    cls, is_user_class = _find_allowed_class(role, target)
    if not_strings := [name for name in arguments if type(name) is not str]:
        raise CheckpointError(f"{role} of the checkpoint: {target} takes no argument {not_strings[0]!r}")
    if is_user_class:
        arguments = {name: _build_nested(value) for name, value in arguments.items()}
    else:
        _reject_nested_classes(role, arguments)
    try:
        check_arguments(cls, target, {**arguments, **extra})
        return construct(cls, target, **arguments, **extra)
    except (ConfigError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{role} of the checkpoint: {printable(str(error))}") from error


def _build_sequential(node: dict[str, Any]) -> Any:
    """Builds the ``torch.nn.Sequential`` that `lightkit.models.description.describe` has described."""
    from lightkit.models.description import build_described

    try:
        return build_described(node)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"model of the checkpoint: {printable(str(error))}") from error


def build_metrics(node: Any) -> dict[str, Any]:
    """Builds the metrics that a checkpoint describes.

    A metric may allocate tables at its first update whose sizes are powers of its arguments, so that the function
    limits the arguments.

    Args:
        node: the configurations of the metrics by name; None for no metrics. A metric that is None is left out.

    Raises:
        CheckpointError: the metrics are too many, a name or an argument exceeds its limit, or a metric cannot be built.
    """
    metrics = {} if node is None else node
    if type(metrics) is not dict or len(metrics) > _MAX_METRICS:
        raise CheckpointError(f"the metrics of the checkpoint must be a mapping of {_MAX_METRICS} at most")
    for name, metric in metrics.items():
        if type(name) is not str or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
            shown = printable(str(name)[:_MAX_NAME_LENGTH])
            raise CheckpointError(f"a metric of the checkpoint has the name {shown!r}")
        arguments = metric if type(metric) is dict else {}
        if "validate_args" in arguments or not all(map(_is_bounded, arguments.values())):
            raise CheckpointError(
                f"metric of the checkpoint: {name} must have numbers up to {_MAX_METRIC_ARGUMENT} and no validate_args"
            )
    return {name: build("metric", metric) for name, metric in metrics.items() if metric is not None}


def _is_bounded(value: Any) -> bool:
    if type(value) is list:
        return len(value) <= _MAX_METRIC_ARGUMENT
    return type(value) is not int or abs(value) <= _MAX_METRIC_ARGUMENT


def _find_allowed_class(role: str, target: str) -> tuple[type, bool]:
    """Returns the class that a checkpoint names for a role.

    Args:
        role: a key of `ALLOWED_CLASSES`.
        target: the dotted path of the class.

    Returns:
        The class; and True if it is in one of the user's packages.

    Raises:
        CheckpointError: the role does not allow the class.
    """
    is_user_class = is_in_user_package(target)
    if not is_user_class and target not in ALLOWED_CLASSES[role]:
        raise CheckpointError(
            f"{role} of the checkpoint: '{printable(target)}' is not among the classes that a checkpoint may name "
            f"there ({', '.join(ALLOWED_CLASSES[role])}){nearest(target, ALLOWED_CLASSES[role])}; admit your own with "
            "LIGHTKIT_TARGETS=PACKAGE"
        )
    try:
        return find_class(target), is_user_class
    except ConfigError as error:
        raise CheckpointError(f"{role} of the checkpoint: {printable(str(error))}") from error


def _build_nested(value: Any) -> Any:
    """Returns an argument of a user's class, in which configurations of objects are replaced by the objects.

    The argument may name classes of the user's packages and of the roles model, loss and metric.
    """
    if type(value) is list:
        return [_build_nested(part) for part in value]
    if type(value) is not dict:
        return value
    if _TARGET not in value:
        return {name: _build_nested(part) for name, part in value.items()}
    role = next((role for role in ("model", "loss", "metric") if value[_TARGET] in ALLOWED_CLASSES[role]), "model")
    return build(role, value)


def _reject_nested_classes(role: str, arguments: Mapping[str, Any]) -> None:
    pending = list(arguments.values())
    while pending:
        value = pending.pop()
        if type(value) is dict and _TARGET in value:
            raise CheckpointError(
                f"{role} of the checkpoint: '{printable(str(value[_TARGET]))}' stands within another class, and a "
                "checkpoint may name no class there"
            )
        pending += value.values() if type(value) is dict else value if type(value) is list else []
