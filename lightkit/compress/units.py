"""The units of a model, such as channels, hidden units and heads, and the parts of the tensors that belong to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# The label of entries that belong to no unit, or to one that must stay.
FIXED = -1


@runtime_checkable
class HasInnerUnits(Protocol):
    """A module that has units of its own inside, such as the heads of an attention.

    The input and the first output of the module do not depend on the number of its units; its state may.
    """

    def inner_units(self) -> tuple[int, dict[str, tuple[int, Tensor]]]:
        """Returns the number of units, and where they are in the module's tensors.

        The second value has, by the name of a parameter, the axis of the units and the unit of each index along the
        axis, int64. Axis 0 computes a unit, and axis 1 reads it.
        """
        ...


@dataclass(frozen=True)
class UnitAxis:
    """An axis of a parameter or buffer along which the units lie.

    Args:
        name: the name of the tensor in the traced module.
        axis: the axis.
        labels: the unit of each index along the axis, int64; `FIXED` for none.
        reads: True if the tensor multiplies the output of the units, False if it computes or scales the output.
    """

    name: str
    axis: int
    labels: Tensor
    reads: bool


@dataclass(frozen=True)
class UnitGroup:
    """The units that one layer, or several whose outputs are added, compute.

    Args:
        name: the names of the layers.
        units: the numbers of the units, sorted.
        dense_count: the number of units of the dense model.
    """

    name: str
    units: tuple[int, ...]
    dense_count: int


@dataclass(frozen=True)
class Multiplication:
    """The multiply-adds of a layer: ``factor`` times the number of its outputs times that of its inputs.

    Args:
        factor: the multiply-adds for one output and one input of one sample.
        out_labels: the unit of each output, int64 of the size of the output.
        in_labels: the unit of each input.
    """

    factor: float
    out_labels: Tensor
    in_labels: Tensor


@dataclass(frozen=True)
class UnitGraph:
    """The units of a model that can be removed.

    Args:
        axes: all axes of tensors along which units lie.
        groups: the units by the layer that computes them.
        multiplications: the layers that multiply, for the count of multiply-adds.
        kept: the reason why the output of a layer stays as it is, by the name of the layer.
        count: one more than the largest number of a unit; 0 without units.
    """

    axes: tuple[UnitAxis, ...]
    groups: tuple[UnitGroup, ...]
    multiplications: tuple[Multiplication, ...]
    kept: dict[str, str]
    count: int

    def macs(self, removed: Tensor | None = None) -> float:
        """Returns the multiply-adds for one sample.

        Args:
            removed: True for each unit that is removed, bool of the size `count`; None for none.
        """
        total = 0.0
        for layer in self.multiplications:
            sides = [_count_alive(labels, removed) for labels in (layer.out_labels, layer.in_labels)]
            total += layer.factor * sides[0] * sides[1]
        return total

    def without(self, removed: Tensor) -> UnitGraph:
        """Returns the units that are left after a removal, with the numbers that they had.

        Args:
            removed: True for each unit that is removed.
        """

        def rest(labels: Tensor) -> Tensor:
            return labels[~is_removed(labels, removed)]

        groups = (
            UnitGroup(g.name, tuple(u for u in g.units if not bool(removed[u])), g.dense_count) for g in self.groups
        )
        return UnitGraph(
            tuple(UnitAxis(a.name, a.axis, rest(a.labels), a.reads) for a in self.axes),
            tuple(groups),
            tuple(Multiplication(m.factor, rest(m.out_labels), rest(m.in_labels)) for m in self.multiplications),
            self.kept,
            self.count,
        )

    def with_dense_counts(self, counts: Mapping[str, int]) -> UnitGraph:
        """Returns the graph with other numbers of units of the dense model, by the name of a group."""
        groups = (replace(group, dense_count=counts.get(group.name, group.dense_count)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    def without_groups(self, reasons: Mapping[str, str]) -> UnitGraph:
        """Returns the graph with some groups fixed.

        Args:
            reasons: the reason for each group that stays as it is, by its name.
        """
        if not reasons:
            return self
        groups = tuple(group for group in self.groups if group.name not in reasons)
        allowed = mask_of((unit for group in groups for unit in group.units), self.count)

        def restrict(labels: Tensor) -> Tensor:
            return torch.where(is_removed(labels, allowed), labels, FIXED)

        return UnitGraph(
            tuple(UnitAxis(a.name, a.axis, restrict(a.labels), a.reads) for a in self.axes),
            groups,
            tuple(
                Multiplication(m.factor, restrict(m.out_labels), restrict(m.in_labels)) for m in self.multiplications
            ),
            {**self.kept, **reasons},
            self.count,
        )

    def kept_indices(self, removed: Tensor) -> dict[str, list[tuple[int, Tensor]]]:
        """Returns, by the name of a tensor, the axes that change and the indices that stay along each.

        Args:
            removed: True for each unit that is removed.
        """
        kept: dict[str, list[tuple[int, Tensor]]] = {}
        for axis in self.axes:
            gone = is_removed(axis.labels, removed)
            if bool(gone.any()):
                kept.setdefault(axis.name, []).append((axis.axis, (~gone).nonzero().flatten()))
        return kept


def is_removed(labels: Tensor, removed: Tensor) -> Tensor:
    """Returns True for each index whose unit is removed; entries without a unit stay."""
    return (
        (labels != FIXED) & removed[labels.clamp(min=0)] if len(removed) else torch.zeros_like(labels, dtype=torch.bool)
    )


def _count_alive(labels: Tensor, removed: Tensor | None) -> int:
    return len(labels) - (0 if removed is None else int(is_removed(labels, removed).sum()))


def mask_of(units: Iterable[int], count: int) -> Tensor:
    """Returns a bool tensor of ``count`` entries that is True for each of ``units``."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(units)] = True
    return mask


class UnionFind:
    """Sets of units that can only be removed together."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._fixed: dict[int, str] = {}

    def allocate(self, count: int) -> Tensor:
        """Returns the numbers of ``count`` new units, int64."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def root(self, unit: int) -> int:
        """Returns the number that stands for the set of a unit."""
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit

    def join(self, first: Tensor, second: Tensor) -> None:
        """Makes each unit of ``first`` and that of ``second`` at the same index one; a fixed entry fixes the other."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if FIXED in (a, b):
                self.fix([x for x in (a, b) if x != FIXED], "its output is added to one that stays as it is")
                continue
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[b] = a
                if b in self._fixed:
                    self._fixed.setdefault(a, self._fixed[b])

    def fix(self, units: Collection[int], reason: str) -> None:
        """Makes units stay; ``reason`` completes the sentence "the layer keeps its width, because ..."."""
        for unit in units:
            if unit != FIXED:
                self._fixed.setdefault(self.root(unit), reason)

    def fixed_reason(self, unit: int) -> str | None:
        """Returns the reason why a unit stays, or None."""
        return self._fixed.get(self.root(unit))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of ``module`` by name; a tensor with several names has its first one."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}
