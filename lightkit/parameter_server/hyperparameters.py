"""Options of an optimizer's parameter groups: a worker sends all at the start, and the numbers with each push."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightkit.errors import ConfigError

GroupOptions = dict[str, Any]
"""The options of one parameter group by name: JSON values, as `group_options` returns them."""

# Options that are no hyperparameters: notes of schedulers, and counters of the optimizer.
_NOT_SENT = ("params", "param_names", "initial_lr", "rounding_seed")


class HyperparameterPath(NamedTuple):
    """The path of a hyperparameter, which is a number among the options of a parameter group.

    Args:
        option: the name of the option.
        position: the index of the number in the option's tuple; -1 if the option itself is a number.
    """

    option: str
    position: int


def group_options(optimizer: Optimizer) -> list[GroupOptions]:
    """Returns, for each parameter group of ``optimizer``, the options except ``params`` as JSON values.

    `lightkit.parameter_server.Client.start` takes them.

    Raises:
        ConfigError: an option is neither a number, a string, None nor a tuple of these.
    """
    return [
        {name: _to_json(name, value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _to_json(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_to_json(name, entry) for entry in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return float(value) if name == "lr" and isinstance(value, (int, float, str)) else value
    raise ConfigError(
        f"the optimizer's option {name} is a {type(value).__name__}: a parameter server accepts numbers, strings, None "
        "and tuples of these"
    )


def find_hyperparameters(options: Mapping[str, Any]) -> list[HyperparameterPath]:
    """Returns the paths of all numbers among the options of a group, sorted by the name of the option."""
    found: list[HyperparameterPath] = []
    for name in sorted(options.keys() - set(_NOT_SENT)):
        option = options[name]
        if _is_number(option):
            found.append(HyperparameterPath(name, -1))
        elif isinstance(option, (list, tuple)):
            found += [HyperparameterPath(name, i) for i, value in enumerate(option) if _is_number(value)]
    return found


def read_hyperparameters(group: Mapping[str, Any], paths: Iterable[HyperparameterPath]) -> list[float]:
    """Returns the numbers of the parameter group ``group`` at ``paths``.

    Raises:
        ConfigError: the value at a path is not a number any more.
    """
    found = []
    for name, position in paths:
        option: Any = group.get(name)
        try:
            value: Any = option if position < 0 else option[position]
        except (IndexError, TypeError):
            value = None
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not _is_number(value):
            raise ConfigError(
                f"the optimizer's option {name} has become {option!r}: an option that was a number at the beginning of "
                "a training with a parameter server must stay a number"
            )
        found.append(float(value))
    return found


def write_hyperparameters(group: dict[str, Any], paths: Iterable[HyperparameterPath], values: Iterable[float]) -> None:
    """Sets the numbers of the parameter group ``group`` at ``paths`` to ``values``.

    An option that is an ``int`` stays an ``int`` if the new value is a whole number, since some options are counts.
    """
    for (name, position), value in zip(paths, values, strict=True):
        before = group[name] if position < 0 else group[name][position]
        after = int(value) if isinstance(before, int) and value.is_integer() else value
        if position < 0:
            group[name] = after
        else:
            group[name] = (*group[name][:position], after, *group[name][position + 1 :])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
