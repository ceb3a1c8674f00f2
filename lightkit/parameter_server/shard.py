"""A server's shard of an optimizer's parameters, and the optimizer that updates them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_map

from lightkit.errors import ConfigError
from lightkit.optim import set_masks
from lightkit.parameter_server.flat_tensors import allocate_flat
from lightkit.parameter_server.hyperparameters import GroupOptions, write_hyperparameters
from lightkit.parameter_server.mask_update import NO_MASKS, MaskUpdate
from lightkit.parameter_server.training_spec import OptimizerSpec
from lightkit.targets import find_class

ParameterState = dict[str, Any]
"""The optimizer's state of one parameter, such as ``{"momentum_buffer": Tensor}``."""


class Shard:
    """A server's part of the parameters of one optimizer, and an optimizer of the same class that updates them.

    Args:
        spec: the specification of the parameters, and the class of the optimizer.
        options: the options of all parameter groups, also of groups without a parameter in this shard.

    Attributes:
        flats: the parameters, one flat tensor for each dtype.
        parameters: the parameters of ``optimizer``, views of ``flats``.
        optimizer: the optimizer; None if the shard has no parameters.
        masks: the masks of the parameters, whose masked entries are zero after each step.

    Raises:
        ConfigError: the class is not allowed, or does not accept such options.
    """

    def __init__(self, spec: OptimizerSpec, options: list[GroupOptions]) -> None:
        self.flats, views = allocate_flat(spec.parameters)
        self.parameters = [nn.Parameter(view) for view in views]
        # The indices of the groups that have a parameter in this shard.
        self._group_indices = sorted({p.group_index for p in spec.parameters})
        self._hyperparameters = spec.hyperparameters
        self.optimizer = self._make_optimizer(spec, options) if self.parameters else None
        self.masks = NO_MASKS

    def _make_optimizer(self, spec: OptimizerSpec, options: list[GroupOptions]) -> Optimizer:
        cls = find_class(spec.optimizer)
        if not issubclass(cls, Optimizer) or issubclass(cls, LBFGS):
            raise ConfigError(
                f"{spec.optimizer} cannot be the optimizer of a parameter server: it does not step once for each "
                "gradient"
            )
        if not all(0 <= index < len(options) == len(spec.hyperparameters) for index in self._group_indices):
            last = self._group_indices[-1]
            raise ConfigError(f"there are options of {len(options)} groups, and parameters in group {last}")
        for index in self._group_indices:
            for name, position in spec.hyperparameters[index]:
                option = options[index].get(name)
                if not (_has_index(option, position) if position >= 0 else isinstance(option, (int, float))):
                    raise ConfigError(f"the options of group {index} have no number {name!r} at {position}")
        groups: list[dict[str, Any]] = []
        for index in self._group_indices:
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in options[index].items()}
            members = [p for p, s in zip(self.parameters, spec.parameters, strict=True) if s.group_index == index]
            groups.append({**given, "params": members})
        # A required argument must be passed, although each group overrides its value.
        arguments = inspect.signature(cls).parameters
        required = {n for n, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        try:
            return cls(groups, **{name: groups[0][name] for name in (required - {"params"}) & groups[0].keys()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the server cannot make {spec.optimizer}: {error}") from None

    def count_hyperparameters(self) -> int:
        """Returns the number of hyperparameters in a push to this shard."""
        return sum(len(self._hyperparameters[index]) for index in self._group_indices)

    def step(self, gradients: Sequence[Tensor], present: Sequence[bool], hyperparameters: Sequence[float]) -> None:
        """Makes a step of the optimizer.

        Args:
            gradients: one tensor for each parameter, in its shape.
            present: for each parameter True if the parameter has a gradient; the step ignores the other gradients.
            hyperparameters: the numbers of all groups of this shard, in the order of `read_hyperparameters`.
        """
        if self.optimizer is None:
            return
        for parameter, gradient, is_present in zip(self.parameters, gradients, present, strict=True):
            parameter.grad = gradient if is_present else None
        remaining = iter(hyperparameters)
        for index, group in zip(self._group_indices, self.optimizer.param_groups, strict=True):
            paths = self._hyperparameters[index]
            write_hyperparameters(group, paths, itertools.islice(remaining, len(paths)))
        self.optimizer.step()

    def set_masks(self, masks: MaskUpdate) -> None:
        """Keeps masked entries of the parameters at zero from now on, unless the shard has masks of a larger number."""
        if masks.number <= self.masks.number:
            return
        self.masks = masks
        if self.optimizer is not None:
            set_masks(self.optimizer, masks.masks(self.parameters))

    def state(self) -> list[ParameterState]:
        """Returns the optimizer's state of each parameter; an empty dict for a parameter without a state."""
        if self.optimizer is None:
            return []
        return [dict(self.optimizer.state.get(parameter, {})) for parameter in self.parameters]

    def rounding_seeds(self) -> list[int | None]:
        """Returns the ``rounding_seed`` of each group of this shard; None for a group without one."""
        return [group.get("rounding_seed") for group in self.optimizer.param_groups] if self.optimizer else []

    def load(self, values: Sequence[Tensor] | None, state: Sequence[ParameterState] | None = None) -> None:
        """Sets the parameters and the optimizer's state.

        Args:
            values: one tensor for each parameter; None keeps the parameters.
            state: the state of each parameter, empty for a parameter without a state; None keeps the optimizer's state.

        Raises:
            ConfigError: a value has another shape than its parameter.
        """
        with torch.no_grad():
            if values is not None:
                for parameter, value in zip(self.parameters, values, strict=True):
                    if parameter.shape != value.shape:
                        raise ConfigError(f"a parameter of shape {list(parameter.shape)} came as {list(value.shape)}")
                    parameter.copy_(value)
        if not state or self.optimizer is None:
            return
        indices = {id(p): index for index, p in enumerate(self.parameters)}
        groups = self.optimizer.state_dict()["param_groups"]
        order = [indices[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        entries = {place: state[index] for place, index in enumerate(order) if state[index]}
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def snapshot(self) -> dict[str, Any]:
        """Returns a copy of the shard.

        Returns:
            A dict: ``flats``, the parameters as flat tensors; ``state``, see `state`; ``seeds``, see `rounding_seeds`;
            and, if the shard has masks, ``mask_number`` and ``masks``: see `MaskUpdate`.
        """
        copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.state())
        found = {"flats": [flat.clone() for flat in self.flats], "state": copied, "seeds": self.rounding_seeds()}
        # Without masks a snapshot is that of the previous release.
        masks = {"mask_number": self.masks.number, "masks": list(self.masks.packed)} if self.masks.number else {}
        return found | masks

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Sets parameters, state, rounding seeds and masks to those in ``snapshot``, which `snapshot` has returned."""
        for flat, saved in zip(self.flats, snapshot["flats"], strict=True):
            flat.copy_(saved)
        self.load(None, snapshot["state"])
        for group, seed in zip(self.optimizer.param_groups if self.optimizer else [], snapshot["seeds"], strict=True):
            if seed is not None:
                group["rounding_seed"] = seed
        self.set_masks(MaskUpdate(snapshot.get("mask_number", 0), snapshot.get("masks", [])))


def _has_index(option: object, position: int) -> bool:
    return isinstance(option, (list, tuple)) and position < len(option)
