"""Plain descriptions of modules: a class and its arguments, from which a checkpoint builds the module again."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn

# The layers that a description may name. Their constructors only compute, and their arguments are plain values.
LAYERS = (
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AvgPool1d", "AvgPool2d"),
    *("BatchNorm1d", "BatchNorm2d", "CELU", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Dropout"),
    *("Dropout1d", "Dropout2d", "ELU", "Embedding", "Flatten", "GELU", "GroupNorm", "Hardsigmoid", "Hardswish"),
    *("Hardtanh", "Identity", "InstanceNorm1d", "InstanceNorm2d", "LayerNorm", "LeakyReLU", "Linear", "LogSigmoid"),
    *("MaxPool1d", "MaxPool2d", "Mish", "PReLU", "RMSNorm", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus"),
    *("Softsign", "Tanh", "Tanhshrink", "Unflatten", "Upsample", "ZeroPad2d"),
)

# The models of lightkit, which keep their arguments.
MODELS = ("CNN", "MLP", "RNN", "RNNLanguageModel", "Transformer")

_SEQUENTIAL = "torch.nn.Sequential"

# Arguments about where and in which dtype a layer is made.
_FACTORY_ARGUMENTS = ("device", "dtype")

_MAX_LAYERS, _MAX_DEPTH = 1000, 20


def describe(module: nn.Module, is_pruned: bool = False) -> dict[str, Any] | None:
    """Returns the description of a module: ``_target_`` and its arguments, as plain containers.

    The function knows lightkit's models, ``torch.nn.Sequential``, and the layers of `LAYERS`, whose attributes have the
    values of their arguments.

    Args:
        module: the module.
        is_pruned: True if tensors of the module may be smaller than those that the description gives.

    Returns:
        The description; None for other modules, and for one whose description gives other weights.
    """
    node = _describe(module)
    if node is None:
        return None
    with torch.device("meta"):
        copy = build_described(node)
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (module, copy)]
    if is_pruned and shapes[0].keys() == shapes[1].keys():
        pairs = [(shape, shapes[1][name]) for name, shape in shapes[0].items()]
        if all(len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True)) for a, b in pairs):
            return node
    return node if shapes[0] == shapes[1] and repr(module) == repr(copy) else None


def build_described(node: dict[str, Any], depth: int = 0) -> nn.Module:
    """Builds the module of a description.

    Args:
        node: the description, which may come from an untrusted file.
        depth: the number of modules around this one.

    Raises:
        ValueError: the description names another class, is nested too deep, or an argument does not fit.
    """
    if type(node) is not dict or depth > _MAX_DEPTH:
        raise ValueError("a layer must be a mapping, nested at most 20 deep")
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    package, _, name = str(node.get("_target_")).rpartition(".")
    if f"{package}.{name}" == _SEQUENTIAL:
        layers = arguments.get("layers")
        if type(layers) is not dict or len(layers) > _MAX_LAYERS or arguments.keys() != {"layers"}:
            raise ValueError(f"{_SEQUENTIAL} takes layers, a mapping of at most {_MAX_LAYERS}")
        sequential = nn.Sequential()
        for key, layer in layers.items():
            if type(key) is not str:
                raise ValueError(f"a layer must have a text as its name, got {key!r}")
            sequential.add_module(key, build_described(layer, depth + 1))
        return sequential
    if package == "torch.nn" and name in LAYERS:
        cls = getattr(nn, name)
    elif package == "lightkit.models" and name in MODELS:
        import lightkit.models

        cls = getattr(lightkit.models, name)
    else:
        raise ValueError(f"{node.get('_target_')!r} is not a layer that a description may name")
    if any(isinstance(value, dict) for value in arguments.values()):
        raise ValueError(f"the arguments of {name} must be plain values")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()})


def _describe(module: nn.Module) -> dict[str, Any] | None:
    cls = type(module)
    if cls is nn.Sequential:
        layers = {name: _describe(child) for name, child in module.named_children()}
        if len(layers) != len(cast(nn.Sequential, module)) or any(layer is None for layer in layers.values()):
            # A layer that stands twice has one name only.
            return None
        return {"_target_": _SEQUENTIAL, "layers": layers}
    if cls.__module__.startswith("lightkit.models.") and cls.__name__ in MODELS:
        return {"_target_": f"lightkit.models.{cls.__name__}", **_plain_arguments(module.hyperparameters)}
    if cls.__name__ not in LAYERS or getattr(nn, cls.__name__, None) is not cls:
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _FACTORY_ARGUMENTS or parameter.kind is parameter.VAR_KEYWORD:
            continue
        value = getattr(module, name, parameter.default)
        # The bias of a layer is its tensor, or None.
        if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
            value = value is not None
        if value is not parameter.default:
            arguments[name] = value
    try:
        return {"_target_": f"torch.nn.{cls.__name__}", **_plain_arguments(arguments)}
    except ValueError:
        return None


def _plain_arguments(arguments: Any) -> dict[str, Any]:
    """Returns arguments with lists in place of tuples.

    Raises:
        ValueError: a value is neither plain nor a tuple or list of plain values.
    """
    plain = {name: list(value) if isinstance(value, (tuple, list)) else value for name, value in arguments.items()}
    for name, value in plain.items():
        if not all(part is None or type(part) in (bool, int, float, str) for part in _parts(value)):
            raise ValueError(f"{name} is no plain value")
    return plain


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
