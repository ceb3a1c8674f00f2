"""Units of networks that a training step calls as a whole and in part, such as a model and its backbone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from lightkit.compress.units import FIXED, UnitGraph, named_tensors

# A tensor, by its id, an axis, an index along it, and the number of the unit there, from 0 on in each group.
_Place = tuple[int, int, int, int]


def separate_roots(roots: Sequence[tuple[nn.Module, UnitGraph]]) -> list[tuple[nn.Module, UnitGraph]]:
    """Returns the called modules and their units, so that each unit belongs to one module.

    A module within another one is left out: the other one has its layers and their multiply-adds. Units of tensors that
    several modules have stay, unless the removal is proven in each call: the modules within find the same units.

    Args:
        roots: the called modules and the units of each.
    """
    places = [_places(root, graph) for root, graph in roots]
    separate: list[tuple[nn.Module, UnitGraph]] = []
    for own, (root, graph) in zip(places, roots, strict=True):
        if any(_is_within(root, other) for other, _ in roots):
            continue
        fixed: set[str] = set()
        for found, (other, _) in zip(places, roots, strict=True):
            if other is not root:
                tensors = {id(tensor) for tensor in named_tensors(other).values()}
                proven = list(found.values()) if _is_within(other, root) else []
                fixed |= {
                    name
                    for name, group in own.items()
                    if any(place[0] in tensors for place in group) and group not in proven
                }
        separate.append((root, graph.without_groups(dict.fromkeys(fixed, "two calls of the step reach it"))))
    return separate


def _is_within(module: nn.Module, other: nn.Module) -> bool:
    return module is not other and any(module is part for part in other.modules())


def _places(root: nn.Module, graph: UnitGraph) -> dict[str, list[_Place]]:
    """Returns where the units of each group lie, by the group's name; the same for all modules that have the units."""
    tensors = named_tensors(root)
    owners = {unit: group.name for group in graph.groups for unit in group.units}
    numbers: dict[str, dict[int, int]] = defaultdict(dict)
    places: dict[str, list[_Place]] = defaultdict(list)
    for tensor, axis, labels in sorted((id(tensors[a.name]), a.axis, a.labels.tolist()) for a in graph.axes):
        for index, unit in enumerate(labels):
            if unit != FIXED:
                known = numbers[owners[unit]]
                places[owners[unit]].append((tensor, axis, index, known.setdefault(unit, len(known))))
    return places
