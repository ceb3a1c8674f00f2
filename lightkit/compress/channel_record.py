"""The channels of the tensors in a call of a model: where they lie, which layer computes them, and who reads them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightkit.compress.units import FIXED, Multiplication, UnionFind, UnitAxis, UnitGraph, UnitGroup


class Channels:
    """The axis of a tensor along which its channels lie, and the unit of each index along the axis, int64."""

    def __init__(self, axis: int, labels: Tensor) -> None:
        self.axis = axis
        self.labels = labels


class ChannelRecord:
    """Collects what a call of a module shows of its units.

    Args:
        root: the module.
        batch: the number of samples of the call.

    Attributes:
        batch: as above.
        units: the units, with those that are one, and the reasons of those that stay.
        axes: the axes of parameters along which units lie.
        multiplications: the products of the layers.
        computed: the units that each layer computes, by the name of the layer.
        names: the name of each module.
        uses: the names of each parameter by its id, and who else reads it.
    """

    def __init__(self, root: nn.Module, batch: int) -> None:
        self.batch = max(1, batch)
        self.units = UnionFind()
        # The tensor is kept, so that no other one gets its id.
        self._channels: dict[int, tuple[Tensor, Channels]] = {}
        self.axes: list[UnitAxis] = []
        self.multiplications: list[Multiplication] = []
        self.computed: dict[str, Tensor] = {}
        self.names = {module: name for name, module in root.named_modules()}
        self.uses: dict[int, list[str]] = defaultdict(list)
        for name, parameter in root.named_parameters(remove_duplicate=False):
            self.uses[id(parameter)].append(name)

    def channels_of(self, tensor: Any) -> Channels | None:
        """Returns the channels of a value; None if it has none that units compute."""
        entry = self._channels.get(id(tensor))
        return None if entry is None else entry[1]

    def set_channels(self, tensor: Any, axis: int, labels: Tensor) -> None:
        """Records the channels of a tensor; other values have none.

        Args:
            tensor: the value.
            axis: the axis along which the channels lie.
            labels: the unit of each index along the axis, int64.
        """
        if isinstance(tensor, Tensor):
            self._channels[id(tensor)] = (tensor, Channels(axis, labels))

    def labels_at(self, x: Tensor, axis: int, name: str) -> Tensor:
        """Returns the unit of each index along ``axis``, by which the layer ``name`` reads ``x``."""
        channels = self.channels_of(x)
        if channels is None:
            return torch.full((x.shape[axis],), FIXED)
        if channels.axis != axis:
            self.fix_tensors([x], f"{name} reads it along another axis")
            return torch.full((x.shape[axis],), FIXED)
        return channels.labels

    def pass_on(self, x: Tensor, output: Tensor) -> None:
        """Gives ``output`` the channels of ``x`` at the same axis; fixes them if they are not as many there."""
        channels = self.channels_of(x)
        if channels is None:
            return
        axis = channels.axis
        if output.dim() == x.dim() and output.shape[axis] == len(channels.labels):
            self.set_channels(output, axis, channels.labels)
        else:
            self.fix_tensors([x], "a function changes its channels")

    def fix_tensors(self, values: Any, reason: str) -> None:
        """Fixes the channels of all tensors in ``values``."""
        for value in tree_leaves(values):
            if (channels := self.channels_of(value)) is not None:
                self.units.fix(channels.labels.tolist(), reason)

    def add_axis(self, name: str, module: nn.Module, own: str, axis: int, labels: Tensor, reads: bool) -> None:
        """Records that units lie along an axis of a layer's parameter or buffer, if the layer has it.

        The units of another call of the layer become one with those of its first call.

        Args:
            name: the name of the layer.
            module: the layer.
            own: the name of the tensor within the layer.
            axis: its axis.
            labels: the unit of each index along the axis, int64.
            reads: True if the layer reads these units, False if it computes them.
        """
        full = f"{name}.{own}" if name else own
        tensor = dict([*module.named_parameters(), *module.named_buffers()]).get(own)
        if tensor is None:
            return
        if len(self.uses[id(tensor)]) > 1:
            self.units.fix(labels.tolist(), f"{full} is shared with another layer")
        known = next((a.labels for a in self.axes if a.name == full and a.axis == axis), None)
        if known is None:
            self.axes.append(UnitAxis(full, axis, labels, reads))
        elif len(known) == len(labels):
            # A layer that is called twice has the same units each time, and surgery indexes its tensors once.
            self.units.join(known, labels)
        else:
            self.units.fix([*known.tolist(), *labels.tolist()], f"{full} has other units in another call")

    def fix_parameter(self, parameter: Tensor) -> None:
        """Fixes the units along a parameter, which a function reads outside of its layer."""
        names = set(self.uses[id(parameter)])
        for axis in self.axes:
            if axis.name in names:
                self.units.fix(axis.labels.tolist(), f"{axis.name} is read by a function")
        # A layer may use the parameter later.
        self.uses[id(parameter)].append("a function")

    def graph(self) -> UnitGraph:
        """Returns the units that can be removed, after the call."""
        groups: dict[frozenset[str], set[int]] = defaultdict(set)
        owners: dict[int, set[str]] = defaultdict(set)
        kept: dict[str, str] = {}
        for name, units in self.computed.items():
            for unit in units.tolist():
                owners[self.units.root(unit)].add(name)
        for unit, names in owners.items():
            reason = self.units.fixed_reason(unit)
            if reason is None:
                groups[frozenset(names)].add(unit)
            else:
                kept |= dict.fromkeys(names, reason)
        found = tuple(
            UnitGroup(" + ".join(sorted(names)), tuple(sorted(units)), len(units)) for names, units in groups.items()
        )
        free = {unit for group in found for unit in group.units}
        lookup = {label: self.units.root(label) for name in self.computed for label in self.computed[name].tolist()}
        lookup = {label: root if root in free else FIXED for label, root in lookup.items()} | {FIXED: FIXED}

        def resolve(labels: Tensor) -> Tensor:
            return torch.tensor([lookup[label] for label in labels.tolist()], dtype=torch.int64)

        axes = [UnitAxis(a.name, a.axis, resolve(a.labels), a.reads) for a in self.axes]
        layers = [Multiplication(m.factor, resolve(m.out_labels), resolve(m.in_labels)) for m in self.multiplications]
        changing = tuple(axis for axis in axes if bool((axis.labels != FIXED).any()))
        return UnitGraph(changing, found, tuple(layers), kept, 1 + max(free, default=-1))
