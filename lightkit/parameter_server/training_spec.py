"""Specifications that workers and servers agree on: parameters, optimizers, and the treatment of pushes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightkit._util.deprecated import RenamedAttribute, renamed_parameters
from lightkit.errors import ConfigError
from lightkit.parameter_server.compression import COMPRESSIONS
from lightkit.parameter_server.encoding import checked_shape, dtype_named
from lightkit.parameter_server.hyperparameters import HyperparameterPath, find_hyperparameters, group_options
from lightkit.targets import nearest

MODES = ("sync", "async", "bounded")

# Ranks of workers are below this number.
MAX_WORKERS = 1 << 16

# The fields of a `TrainingSpec` that all workers must have in common, beside the optimizers.
_SETTINGS = ("workers", "mode", "staleness", "compression", "fraction", "snapshot_every")


@dataclass(frozen=True)
class ParameterSpec:
    """The specification of a parameter.

    Args:
        name: the name of the parameter in the module.
        shape: the sizes of the parameter.
        dtype: the name of the dtype, such as ``float32``.
        group_index: the index of the parameter's group in the optimizer.
    """

    name: str
    shape: list[int]
    dtype: str
    group_index: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or type(self.group_index) is not int or self.group_index < 0:
            raise ValueError(f"{str(self.name)[:100]!r} in group {str(self.group_index)[:100]!r} is no parameter")
        checked_shape(self.shape)
        dtype_named(self.dtype)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the parameter's elements."""
        return self.count * dtype_named(self.dtype).itemsize

    @property
    def count(self) -> int:
        """The number of the parameter's elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} ({'x'.join(map(str, self.shape)) or 'a number'}, {self.dtype})"

    # The JSON keys of the previous release: servers recover from its snapshots.

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {"name": self.name, "shape": self.shape, "dtype": self.dtype, "group": self.group_index}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParameterSpec:
        """Returns the specification that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is no such description.
        """
        fields = dict(value)
        return cls(group_index=fields.pop("group"), **fields)


@renamed_parameters(numbers="hyperparameters")
@dataclass(frozen=True)
class OptimizerSpec:
    """The class of an optimizer and its parameters.

    Args:
        optimizer: the path ``MODULE.CLASS`` of the class, in a package that a configuration may use: see
            `lightkit.targets.allow_targets`.
        parameters: all parameters, in the order of the optimizer's groups.
        hyperparameters: for each group the paths of the numbers among its options. Each push contains their values,
            since schedulers change them.
    """

    optimizer: str
    parameters: list[ParameterSpec]
    hyperparameters: list[list[HyperparameterPath]]

    numbers = RenamedAttribute("hyperparameters")
    of = RenamedAttribute("from_optimizer")

    @classmethod
    def from_optimizer(cls, optimizer: Optimizer, names: Mapping[Tensor, str]) -> OptimizerSpec:
        """Returns the specification of an optimizer.

        Args:
            optimizer: the optimizer.
            names: the name of each parameter of ``optimizer``.
        """
        kind = type(optimizer)
        parameters = [
            ParameterSpec(names[p], list(p.shape), str(p.dtype).partition(".")[2], index)
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        ]
        paths = [find_hyperparameters(group) for group in group_options(optimizer)]
        return cls(f"{kind.__module__}.{kind.__qualname__}", parameters, paths)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        paths = [[list(path) for path in group] for group in self.hyperparameters]
        return {"optimizer": self.optimizer, "parameters": [p.to_json() for p in self.parameters], "numbers": paths}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OptimizerSpec:
        """Returns the specification that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is no such description.
        """
        return cls(
            str(value["optimizer"]),
            [ParameterSpec.from_json(parameter) for parameter in value["parameters"]],
            [[HyperparameterPath(str(name), int(i)) for name, i in group] for group in value["numbers"]],
        )


@renamed_parameters(tables="optimizers")
@dataclass(frozen=True)
class TrainingSpec:
    """The optimizers of a training and the treatment of pushes.

    Args:
        optimizers: one specification for each optimizer.
        workers: the number of workers that begin together, at most 65536; workers may come and go later.
        mode: ``sync``: the server makes a step with the mean gradient when all workers have pushed. ``async``: the
            server makes a step with the gradient of each push. ``bounded``: as ``async``, and no worker is more than
            ``staleness`` pushes ahead of the slowest worker.
        staleness: the number of pushes in the mode ``bounded``.
        compression: compression of pushes: ``none``; ``bf16``; ``topk``, the elements that are largest in absolute
            value, with the rest added to the next gradient (error feedback).
        fraction: the fraction of the gradient's elements that ``topk`` sends.
        snapshot_every: the number of updates from one snapshot of a server to the next; the server logs each update in
            between. 0 writes neither snapshots nor a log.

    Raises:
        ConfigError: a value is out of range.
    """

    optimizers: list[OptimizerSpec]
    workers: int = 1
    mode: str = "sync"
    staleness: int = 4
    compression: str = "none"
    fraction: float = 0.01
    snapshot_every: int = 1000

    tables = RenamedAttribute("optimizers")
    parts = RenamedAttribute("shards")
    most_bytes = RenamedAttribute("max_message_bytes")

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, MODES), ("compression", self.compression, COMPRESSIONS)):
            if value not in choices:
                # A worker may send a long string.
                hint = nearest(str(value)[:100], choices)
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {repr(value)[:100]}{hint}")
        for name, least in (("workers", 1), ("staleness", 0), ("snapshot_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number, at least {least}, got {repr(value)[:100]}")
        if self.workers > MAX_WORKERS:
            raise ConfigError(f"workers must be at most {MAX_WORKERS}, got {repr(self.workers)[:100]}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {self.fraction!r}")

    # The JSON keys of the previous release: servers recover from its snapshots.

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {"tables": [spec.to_json() for spec in self.optimizers], **settings}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingSpec:
        """Returns the specification that `to_json` described.

        Raises:
            ConfigError: ``value`` is no such description.
        """
        try:
            settings = dict(value)
            optimizers = [OptimizerSpec.from_json(spec) for spec in settings.pop("tables")]
            if unknown := settings.keys() - set(_SETTINGS):
                raise ValueError(f"unknown keys {str(sorted(unknown))[:100]}")
            return cls(optimizers, **settings)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is not the description of a training: {error}") from None

    @property
    def nbytes(self) -> int:
        """The number of bytes of all parameters."""
        return sum(parameter.nbytes for spec in self.optimizers for parameter in spec.parameters)

    @property
    def max_message_bytes(self) -> int:
        """The largest number of bytes of tensors in a message with the parameters and the optimizer states.

        The state of torch's optimizers takes a few times as many bytes as the parameters, and a few numbers for each
        parameter.
        """
        return 16 * self.nbytes + (1 << 16) * sum(1 + len(spec.parameters) for spec in self.optimizers)

    def shards(self, servers: int) -> list[TrainingSpec]:
        """Returns the specification of the shard of each of ``servers`` servers.

        A shard has whole parameters. The method assigns the parameters, from the largest to the smallest, to the server
        with the fewest elements so far.
        """
        loads = [0] * servers
        owners: dict[tuple[int, int], int] = {}
        every = [(o, i, p) for o, spec in enumerate(self.optimizers) for i, p in enumerate(spec.parameters)]
        for o, i, parameter in sorted(every, key=lambda entry: -entry[2].count):
            owners[o, i] = loads.index(min(loads))
            loads[owners[o, i]] += parameter.count
        return [
            replace(
                self,
                optimizers=[
                    replace(spec, parameters=[p for i, p in enumerate(spec.parameters) if owners[o, i] == server])
                    for o, spec in enumerate(self.optimizers)
                ],
            )
            for server in range(servers)
        ]

    def difference(self, other: TrainingSpec) -> str | None:
        """Returns the first difference between this specification and ``other``, that of another worker.

        Returns:
            The difference, as a message to that worker; None if the specifications are equal.
        """
        for name in _SETTINGS:
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return f"{name} is {there} at this worker and {here} at the others"
        for ours, theirs in zip(self.optimizers, other.optimizers, strict=False):
            if ours.optimizer != theirs.optimizer:
                return f"the optimizer is {theirs.optimizer} at this worker and {ours.optimizer} at the others"
            for one, another in zip(ours.parameters, theirs.parameters, strict=False):
                if one != another:
                    return f"it has another model: {another} where the others have {one}"
            counts = len(theirs.parameters), len(ours.parameters)
            if counts[0] != counts[1]:
                return f"it has another model, of {counts[0]} parameters instead of {counts[1]}"
            if ours.hyperparameters != theirs.hyperparameters:
                return "its optimizer has other groups, or other options that are numbers, than at the others"
        if len(self.optimizers) != len(other.optimizers):
            return f"it has {len(other.optimizers)} optimizers and the others {len(self.optimizers)}"
        return None
