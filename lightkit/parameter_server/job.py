"""What workers and servers must agree on before they train: parameters, optimizers, and how pushes are treated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightkit.config import nearest
from lightkit.errors import ConfigError
from lightkit.parameter_server.compression import COMPRESSIONS
from lightkit.parameter_server.encoding import checked_shape, dtype_named

MODES = ("sync", "async", "bounded")

# Ranks of workers are below this.
MOST_WORKERS = 1 << 16


@dataclass(frozen=True)
class Parameter:
    """One of them: its name, shape and dtype, and the group of the optimizer that it is in."""

    name: str
    shape: list[int]
    dtype: str
    group: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or type(self.group) is not int or self.group < 0:
            raise ValueError(f"{str(self.name)[:100]!r} in group {str(self.group)[:100]!r} is no parameter")
        checked_shape(self.shape)
        dtype_named(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.count * dtype_named(self.dtype).itemsize

    @property
    def count(self) -> int:
        """Its elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} ({'x'.join(map(str, self.shape)) or 'a number'}, {self.dtype})"


@dataclass(frozen=True)
class Table:
    """The parameters of an optimizer, and its class.

    Args:
        optimizer: ``MODULE.CLASS``, of a package that a configuration may use: see `lightkit.config.allow_targets`.
        parameters: in the order of the optimizer's groups.
        numbers: for each group the options that are numbers, which come anew with each push: schedulers change them.
            Each is a name and a position in the option's tuple, or -1 where that is no tuple.
    """

    optimizer: str
    parameters: list[Parameter]
    numbers: list[list[list[Any]]]

    @classmethod
    def of(cls, optimizer: Optimizer, names: dict[Tensor, str]) -> Table:
        """That of an optimizer whose parameters have these names."""
        kind = type(optimizer)
        parameters = [
            Parameter(names[p], list(p.shape), str(p.dtype).partition(".")[2], index)
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        ]
        numbers = [_find_numbers(group) for group in options_of(optimizer)]
        return cls(f"{kind.__module__}.{kind.__qualname__}", parameters, numbers)


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Args:
        tables: one for each optimizer.
        workers: that begin together, at most 65536; their number may change.
        mode: ``sync``: the server steps when all workers have pushed, along the mean of their gradients. ``async``: at
            each push. ``bounded``: likewise, but no worker is more than ``staleness`` pushes ahead of the slowest.
        staleness: of ``bounded``.
        compression: of pushes: ``none``; ``bf16``; ``topk``, the largest in absolute value, with what was not sent
            added to the next gradient (error feedback).
        fraction: of the gradient that ``topk`` sends.
        snapshot_every: updates from one snapshot of a server to the next, with a log of each update in between; 0 for
            neither.

    Raises:
        ConfigError: a value out of range.
    """

    tables: list[Table]
    workers: int = 1
    mode: str = "sync"
    staleness: int = 4
    compression: str = "none"
    fraction: float = 0.01
    snapshot_every: int = 1000

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, MODES), ("compression", self.compression, COMPRESSIONS)):
            if value not in choices:
                # A server hears it from whoever has the secret: it may be long.
                hint = nearest(str(value)[:100], choices)
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {repr(value)[:100]}{hint}")
        for name, least in (("workers", 1), ("staleness", 0), ("snapshot_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number, at least {least}, got {repr(value)[:100]}")
        if self.workers > MOST_WORKERS:
            raise ConfigError(f"workers must be at most {MOST_WORKERS}, got {repr(self.workers)[:100]}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {self.fraction!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """The job of such containers.

        Raises:
            ConfigError: they do not describe one.
        """
        try:
            tables = [
                Table(
                    str(table["optimizer"]),
                    [Parameter(**p) for p in table["parameters"]],
                    [[[str(name), int(position)] for name, position in group] for group in table["numbers"]],
                )
                for table in value["tables"]
            ]
            return cls(**{**value, "tables": tables})
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is not the description of a job: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(parameter.nbytes for table in self.tables for parameter in table.parameters)

    @property
    def most_bytes(self) -> int:
        """Bytes of tensors that a message with its parameters and the optimizers' state may have, whatever those are.

        The state of torch's optimizers takes a few times as much as the parameters, and a few numbers of each.
        """
        return 16 * self.nbytes + (1 << 16) * sum(1 + len(table.parameters) for table in self.tables)

    def parts(self, servers: int) -> list[Job]:
        """What each server has: whole parameters, the largest first to whoever has least so far."""
        loads = [0] * servers
        owners: dict[tuple[int, int], int] = {}
        every = [(t, i, p) for t, table in enumerate(self.tables) for i, p in enumerate(table.parameters)]
        for t, i, parameter in sorted(every, key=lambda entry: -entry[2].count):
            owners[t, i] = loads.index(min(loads))
            loads[owners[t, i]] += parameter.count
        return [
            replace(
                self,
                tables=[
                    replace(table, parameters=[p for i, p in enumerate(table.parameters) if owners[t, i] == server])
                    for t, table in enumerate(self.tables)
                ],
            )
            for server in range(servers)
        ]

    def difference(self, other: Job) -> str | None:
        """In what another worker's job is another one, or None."""
        for name in ("workers", "mode", "staleness", "compression", "fraction", "snapshot_every"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return f"{name} is {there} at this worker and {here} at the others"
        for here, there in zip(self.tables, other.tables, strict=False):
            if here.optimizer != there.optimizer:
                return f"the optimizer is {there.optimizer} at this worker and {here.optimizer} at the others"
            for one, another in zip(here.parameters, there.parameters, strict=False):
                if one != another:
                    return f"it has another model: {another} where the others have {one}"
            if len(here.parameters) != len(there.parameters):
                return f"it has another model, of {len(there.parameters)} parameters instead of {len(here.parameters)}"
            if here.numbers != there.numbers:
                return "other options of its optimizer are numbers than at the others, or it has other groups"
        if len(self.tables) != len(other.tables):
            return f"it has {len(other.tables)} optimizers and the others {len(self.tables)}"
        return None


def allocate(parameters: Sequence[Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Zeros for these parameters: one flat tensor for each dtype, and views of those in the parameters' shapes."""
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.count
    flats = [torch.zeros(count, dtype=dtype_named(name)) for name, count in counts.items()]
    return flats, views_of(flats, parameters)


def views_of(flats: Iterable[Tensor], parameters: Sequence[Parameter]) -> list[Tensor]:
    """The parameters within flat tensors such as `allocate` makes."""
    rests = {str(flat.dtype).partition(".")[2]: flat for flat in flats}
    views = []
    for parameter in parameters:
        part, rests[parameter.dtype] = rests[parameter.dtype].tensor_split([parameter.count])
        views.append(part.view(parameter.shape))
    return views


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of an optimizer's groups, such as can be sent.

    Raises:
        ConfigError: one of them cannot.
    """
    return [
        {name: _plain(name, value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return float(value) if name == "lr" else value
    raise ConfigError(
        f"the optimizer's option {name} is a {type(value).__name__}, which a parameter server cannot be told: it takes "
        "numbers, strings and tuples of them"
    )


# Options that are not the worker's to set: what a scheduler notes down for itself, and what the optimizer counts.
_NOT_TOLD = ("params", "param_names", "initial_lr", "rounding_seed")


def _find_numbers(options: dict[str, Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for name in sorted(options.keys() - set(_NOT_TOLD)):
        if _is_number(options[name]):
            found.append([name, -1])
        elif isinstance(options[name], (list, tuple)):
            found += [[name, position] for position, value in enumerate(options[name]) if _is_number(value)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_numbers(group: dict[str, Any], where: Iterable[Sequence[Any]]) -> list[float]:
    """The options of a group of an optimizer at these places: see `Table`.

    Raises:
        ConfigError: one of them is no number any more.
    """
    found = []
    for name, position in where:
        option = group.get(name)
        try:
            value = option if position < 0 else option[position]
        except (IndexError, TypeError):
            value = None
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not _is_number(value):
            raise ConfigError(
                f"the optimizer's option {name} has become {option!r}: what was a number when the training with a "
                "parameter server began must stay one"
            )
        found.append(float(value))
    return found


def write_numbers(group: dict[str, Any], where: Iterable[Sequence[Any]], values: Iterable[float]) -> None:
    """Sets what `read_numbers` has found; what was a whole number stays one, where it is."""
    for (name, position), value in zip(where, values, strict=True):
        before = group[name] if position < 0 else group[name][position]
        after = int(value) if isinstance(before, int) and value.is_integer() else value
        if position < 0:
            group[name] = after
        else:
            group[name] = (*group[name][:position], after, *group[name][position + 1 :])
