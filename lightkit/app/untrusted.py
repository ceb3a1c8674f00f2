"""The configuration inside a checkpoint, which may be a stranger's: what it may build, and how that is built.

Each place of it admits the exact public classes listed here, which do nothing when they are built but compute, and
plain values as their arguments: no class within a class, no interpolation, no other module. A capability that brings a
class adds it to its place. Packages that the user names with ``LIGHTKIT_TARGETS`` or `lightkit.config.allow_targets`
are admitted in every place, and within each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightkit._util.printable import printable
from lightkit.config import construct
from lightkit.errors import CheckpointError, ConfigError
from lightkit.targets import check_arguments, find_class, nearest, user_packages

ADMITTED: dict[str, tuple[str, ...]] = {
    "model": (
        "lightkit.models.CNN",
        "lightkit.models.RNN",
        "lightkit.models.RNNLanguageModel",
        "lightkit.models.Transformer",
    ),
    "task": (
        "lightkit.tasks.ClassificationTask",
        "lightkit.tasks.ForecastTask",
        "lightkit.tasks.LanguageModelTask",
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
        "lightkit.data.FashionMNIST",
        "lightkit.data.MNIST",
        "lightkit.data.MNIST5k",
        "lightkit.data.Series",
        "lightkit.data.Sunspots",
        "lightkit.data.Text",
    ),
}

_TARGET = "_target_"

# Bounds of what a configuration holds; those of lightkit have some 150 values, nested four deep.
_MOST_VALUES, _MOST_DEPTH, _MOST_LETTERS, _LARGEST = 10_000, 12, 4096, 2**63


# Bounds of metrics: how many, the letters of a name, and a number of classes or thresholds.
_MOST_METRICS, _LONGEST_NAME, _LARGEST_NUMBER = 50, 100, 1000


def check_plain(config: Any) -> None:
    """Refuses anything in the configuration of a checkpoint that is not a bounded tree of plain values.

    Raises:
        CheckpointError: an object, a key that is neither text nor number, or a text, number or nesting beyond all use.
    """
    count = 0
    waiting = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _MOST_DEPTH or count > _MOST_VALUES:
            raise CheckpointError(
                "the configuration in the checkpoint is nested too deep or too large: at most "
                f"{_MOST_DEPTH} levels and {_MOST_VALUES} values are read"
            )
        if type(value) is dict:
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
            if not all(type(key) in (str, int) for key in value):
                raise CheckpointError("the configuration in the checkpoint has a key that is no text and no number")
        elif type(value) is list:
            waiting += [(part, depth + 1) for part in value]
        elif type(value) is str:
            if len(value) > _MOST_LETTERS:
                raise CheckpointError(f"the configuration in the checkpoint has a text of {len(value):,} characters")
        elif type(value) is int:
            if not -_LARGEST <= value < _LARGEST:
                raise CheckpointError("the configuration in the checkpoint has a number beyond 64 bits")
        elif value is not None and type(value) not in (bool, float):
            raise CheckpointError(f"the configuration in the checkpoint holds a {type(value).__name__}")


def build(place: str, node: Any, **extra: Any) -> Any:
    """Builds what a checkpoint names in a place.

    Args:
        place: a key of `ADMITTED`.
        node: the configuration there: ``_target_`` and plain arguments.
        **extra: further arguments, which are the caller's and win over the checkpoint's.

    Raises:
        CheckpointError: the place does not admit the class, or the class refuses the arguments.
    """
    if type(node) is not dict or type(node.get(_TARGET)) is not str:
        raise CheckpointError(f"the configuration in the checkpoint names no class in {place}._target_")
    target = node[_TARGET]
    arguments = {name: value for name, value in node.items() if name not in (_TARGET, "_partial_", *extra)}
    cls, is_users = _find(place, target)
    if strange := [name for name in arguments if type(name) is not str]:
        raise CheckpointError(f"{place} of the checkpoint: {target} takes no argument {strange[0]!r}")
    if is_users:
        arguments = {name: _build_inner(value) for name, value in arguments.items()}
    else:
        _refuse_nesting(place, arguments)
    try:
        check_arguments(cls, target, {**arguments, **extra})
        return construct(cls, target, **arguments, **extra)
    except (ConfigError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{place} of the checkpoint: {printable(str(error))}") from error


def build_metrics(node: Any) -> dict[str, Any]:
    """Builds the metrics that a checkpoint names.

    Their tables may be larger than their numbers by a power, and are made as they are fed: numbers are bounded here.

    Raises:
        CheckpointError: there are too many, or one has a number or a name beyond all use, or cannot be built.
    """
    metrics = {} if node is None else node
    if type(metrics) is not dict or len(metrics) > _MOST_METRICS:
        raise CheckpointError(f"the metrics of the checkpoint must be a mapping of {_MOST_METRICS} at most")
    for name, metric in metrics.items():
        if type(name) is not str or len(name) > _LONGEST_NAME or not name.isprintable():
            raise CheckpointError(f"a metric of the checkpoint has the name {printable(str(name)[:_LONGEST_NAME])!r}")
        arguments = metric if type(metric) is dict else {}
        if "validate_args" in arguments or not all(map(_is_moderate, arguments.values())):
            raise CheckpointError(
                f"metric of the checkpoint: {name} must have numbers up to {_LARGEST_NUMBER} and no validate_args"
            )
    return {name: build("metric", metric) for name, metric in metrics.items()}


def _is_moderate(value: Any) -> bool:
    if type(value) is list:
        return len(value) <= _LARGEST_NUMBER
    return type(value) is not int or abs(value) <= _LARGEST_NUMBER


def _find(place: str, target: str) -> tuple[type, bool]:
    """Returns the class, and True if it is one of the user's packages."""
    is_users = any(target.startswith(f"{package}.") for package in user_packages())
    if not is_users and target not in ADMITTED[place]:
        raise CheckpointError(
            f"{place} of the checkpoint: '{printable(target)}' is not among the classes that a checkpoint may name "
            f"there ({', '.join(ADMITTED[place])}){nearest(target, ADMITTED[place])}; admit your own with "
            "LIGHTKIT_TARGETS=PACKAGE"
        )
    try:
        return find_class(target), is_users
    except ConfigError as error:
        raise CheckpointError(f"{place} of the checkpoint: {printable(str(error))}") from error


def _build_inner(value: Any) -> Any:
    """Builds an argument of a class of the user's, which may hold further such classes, and those that compute."""
    if type(value) is list:
        return [_build_inner(part) for part in value]
    if type(value) is not dict:
        return value
    if _TARGET not in value:
        return {name: _build_inner(part) for name, part in value.items()}
    place = next((place for place in ("model", "loss", "metric") if value[_TARGET] in ADMITTED[place]), "model")
    return build(place, value)


def _refuse_nesting(place: str, arguments: Mapping[str, Any]) -> None:
    waiting = list(arguments.values())
    while waiting:
        value = waiting.pop()
        if type(value) is dict and _TARGET in value:
            raise CheckpointError(
                f"{place} of the checkpoint: '{printable(str(value[_TARGET]))}' stands within another class, and a "
                "checkpoint may name no class there"
            )
        waiting += value.values() if type(value) is dict else value if type(value) is list else []
