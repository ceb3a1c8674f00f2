"""The parts that a task takes: a model, an optimizer and a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from lightkit._util.imported import is_instance
from lightkit.targets import is_plain_type, type_hints

if TYPE_CHECKING:
    from torch import nn

# The parameters by which a task takes its parts, and the groups that describe the parts.
PARTS = {"model": "model", "optimizer": "optim", "scheduler": "scheduler"}


def parameter_names(cls: type) -> set[str]:
    """Returns the names of a constructor's parameters; with ``**options`` also those of the base classes."""
    return set(_parameters(cls))


def required_names(cls: type) -> set[str]:
    """Returns the names of the parameters of a constructor that have no default."""
    try:
        own = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, parameter in own.items() if parameter.default is parameter.empty and parameter.kind in kinds}


def taken_parts(cls: type, given: Container[str] = ()) -> set[str]:
    """Returns the parts of `PARTS` that the class of a task takes as arguments.

    A parameter of a plain type, such as ``model: str = "small"``, takes no part; neither does an argument that the
    configuration gives.

    Args:
        cls: the class of the task.
        given: the names of the arguments that the configuration gives.
    """
    parameters = _parameters(cls)
    hints = type_hints(cls)
    return {
        name
        for name in PARTS
        if name in parameters and name not in given and not _is_plain(parameters[name], hints.get(name))
    }


def model_of(task: Any) -> nn.Module | None:
    """Returns the attribute ``model`` of a task; None if the task of a user has no such module."""
    model = getattr(task, "model", None)
    return model if is_instance(model, "torch.nn", "Module") else None


def _is_plain(parameter: inspect.Parameter, hint: object) -> bool:
    default = parameter.default
    has_plain_default = default is not parameter.empty and default is not None and is_plain_type(type(default))
    return has_plain_default or (hint is not None and is_plain_type(hint))


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Returns the named parameters of a constructor by name."""
    try:
        own = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return {}
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {name: parameter for name, parameter in own.items() if parameter.kind not in variable}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
        # Such a constructor mostly passes its options to the base class.
        for base in cls.__mro__[1:]:
            if base is object or "__init__" not in vars(base):
                continue
            inherited = inspect.signature(base.__init__).parameters
            found |= {
                name: p
                for name, p in inherited.items()
                if p.kind not in variable and name not in found and name != "self"
            }
    return found
