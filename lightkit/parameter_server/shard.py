"""A server's part of the parameters of an optimizer, and that optimizer."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_map

from lightkit.config import find_class
from lightkit.errors import ConfigError
from lightkit.parameter_server.job import Table, allocate, write_numbers


class Shard:
    """Parameters and their optimizer.

    Args:
        table: the parameters, and the class of the optimizer.
        options: of its groups, also of those that have no parameter here.

    Raises:
        ConfigError: the class is not one of a trusted package, or does not work with such options.
    """

    def __init__(self, table: Table, options: list[dict[str, Any]]) -> None:
        self.flats, views = allocate(table.parameters)
        self.parameters = [nn.Parameter(view) for view in views]
        # Groups keep their numbers: a worker may have some whose parameters are all on other servers.
        self._groups = sorted({p.group for p in table.parameters})
        self._numbers = table.numbers
        self.optimizer = self._make_optimizer(table, options) if self.parameters else None

    def _make_optimizer(self, table: Table, options: list[dict[str, Any]]) -> Optimizer:
        cls = find_class(table.optimizer)
        if not issubclass(cls, Optimizer) or issubclass(cls, LBFGS):
            raise ConfigError(
                f"{table.optimizer} cannot be the optimizer of a parameter server: it does not step once "
                "for each gradient"
            )
        if not all(0 <= group < len(options) == len(table.numbers) for group in self._groups):
            raise ConfigError(f"there are options of {len(options)} groups, and parameters in group {self._groups[-1]}")
        for number in self._groups:
            for name, position in table.numbers[number]:
                option = options[number].get(name)
                if not (_is_within(position, option) if position >= 0 else isinstance(option, (int, float))):
                    raise ConfigError(f"the options of group {number} have no number {name!r} at {position}")
        groups = []
        for number in self._groups:
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in options[number].items()}
            members = [p for p, spec in zip(self.parameters, table.parameters, strict=True) if spec.group == number]
            groups.append({**given, "params": members})
        # Arguments without a default have no say: each group brings its own.
        taken = inspect.signature(cls).parameters
        needed = {n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        try:
            return cls(groups, **{name: groups[0][name] for name in (needed - {"params"}) & groups[0].keys()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the server cannot make {table.optimizer}: {error}") from None

    def count_numbers(self) -> int:
        """How many numbers come with a push to say what the optimizer's options are."""
        return sum(len(self._numbers[number]) for number in self._groups)

    def step(self, gradients: Sequence[Tensor], present: Sequence[bool], numbers: Sequence[float]) -> None:
        """Updates the parameters that have a gradient.

        Args:
            gradients: one for each parameter.
            present: which of them there are.
            numbers: the options of the groups here, one after the other as `read_numbers` gives them.
        """
        if self.optimizer is None:
            return
        for parameter, gradient, there in zip(self.parameters, gradients, present, strict=True):
            parameter.grad = gradient if there else None
        remaining = iter(numbers)
        for number, group in zip(self._groups, self.optimizer.param_groups, strict=True):
            where = self._numbers[number]
            write_numbers(group, where, itertools.islice(remaining, len(where)))
        self.optimizer.step()

    def state(self) -> list[dict[str, Any]]:
        """The optimizer's state of each parameter."""
        if self.optimizer is None:
            return []
        return [dict(self.optimizer.state.get(parameter, {})) for parameter in self.parameters]

    def seeds(self) -> list[int | None]:
        """Of each group here, what its random numbers go on from."""
        return [group.get("rounding_seed") for group in self.optimizer.param_groups] if self.optimizer else []

    def load(self, values: Sequence[Tensor] | None, state: Sequence[dict[str, Any]] | None = None) -> None:
        """Sets the parameters, and the optimizer's state of them where there is one.

        Raises:
            ConfigError: they do not fit.
        """
        with torch.no_grad():
            if values is not None:
                for parameter, value in zip(self.parameters, values, strict=True):
                    if parameter.shape != value.shape:
                        raise ConfigError(f"a parameter of shape {list(parameter.shape)} came as {list(value.shape)}")
                    parameter.copy_(value)
        if not state or self.optimizer is None:
            return
        numbers = {id(p): index for index, p in enumerate(self.parameters)}
        groups = self.optimizer.state_dict()["param_groups"]
        order = [numbers[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        entries = {place: state[number] for place, number in enumerate(order) if state[number]}
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def snapshot(self) -> dict[str, Any]:
        """All of it, to be written to a file."""
        copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.state())
        return {"flats": [flat.clone() for flat in self.flats], "state": copied, "seeds": self.seeds()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Sets what `snapshot` gave."""
        for flat, saved in zip(self.flats, snapshot["flats"], strict=True):
            flat.copy_(saved)
        self.load(None, snapshot["state"])
        for group, seed in zip(self.optimizer.param_groups if self.optimizer else [], snapshot["seeds"], strict=True):
            if seed is not None:
                group["rounding_seed"] = seed


def _is_within(position: int, option: Any) -> bool:
    return isinstance(option, (list, tuple)) and position < len(option)
