"""The choice of units to remove: the least important ones for the multiply-adds that they take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightkit.compress.units import FIXED, UnitGraph, UnitGroup, mask_of

# A layer keeps this share of its units at least: with fewer it lets nothing through.
_MIN_SHARE = 1 / 16

# The share of the remaining units of a layer that is removed between two counts of the multiply-adds.
_STEP_SHARE = 1 / 64


def choose_units(graph: UnitGraph, importance: Tensor, target: float, multiple: int = 1) -> Tensor:
    """Returns True for each unit to remove, so that at most ``target`` multiply-adds are left if that is possible.

    The layers compete: the next units to go are those of the layer whose least important units have the least
    importance for each multiply-add that their removal saves. A layer keeps a sixteenth of its units at least.

    Args:
        graph: the units.
        importance: the importance of each unit, ``(graph.count)``.
        target: the number of multiply-adds for one sample.
        multiple: wide layers, of at least twice as many units, keep a multiple of this number; or of half of it, where
            the multiply-adds that whole multiples would leave unused allow that.

    Returns:
        The units to remove, bool ``(graph.count)``, on the CPU.
    """
    importance = importance.detach().double().cpu()
    removed = torch.zeros(graph.count, dtype=torch.bool)
    # The units of each layer that are left, the most important one first.
    left = {group.name: sorted(group.units, key=lambda unit: -float(importance[unit])) for group in graph.groups}
    steps = {group.name: _step(group, multiple) for group in graph.groups}
    while graph.macs(removed) > target:
        savings = _savings(graph, removed)
        best: tuple[float, str, int] | None = None
        for name, units in left.items():
            step, limit = steps[name]
            # The first step of a layer leaves a multiple.
            count = len(units) % step or step
            if len(units) - count < limit:
                continue
            saved = float(savings[units[-count:]].sum())
            score = float(importance[units[-count:]].sum()) / saved if saved > 0 else math.inf
            if best is None or score < best[0]:
                best = (score, name, count)
        if best is None:
            break
        _, name, count = best
        removed[left[name][-count:]] = True
        del left[name][-count:]
    if multiple % 2 == 0:
        _keep_more(graph, importance, target, multiple // 2, removed)
    return removed


def _keep_more(graph: UnitGraph, importance: Tensor, target: float, count: int, removed: Tensor) -> None:
    """Takes the most important removed units of wide layers back, while the multiply-adds stay within the target.

    Args:
        graph: the units.
        importance: the importance of each unit, float64 ``(graph.count)``.
        target: the number of multiply-adds.
        count: the number of units of a layer that come back at once.
        removed: the removed units, which the function changes.
    """
    wide = [group for group in graph.groups if group.dense_count >= 4 * count]
    while True:
        present = graph.macs(removed)
        best: tuple[float, list[int]] | None = None
        for group in wide:
            gone = sorted((unit for unit in group.units if removed[unit]), key=lambda unit: -float(importance[unit]))
            units = gone[:count]
            if len(units) < count:
                continue
            kept = removed.clone()
            kept[units] = False
            macs = graph.macs(kept)
            score = float(importance[units].sum()) / max(macs - present, 1.0)
            if macs <= target and (best is None or score > best[0]):
                best = score, units
        if best is None:
            return
        removed[best[1]] = False


def smallest_macs(graph: UnitGraph, multiple: int = 1) -> float:
    """Returns the multiply-adds that are left if each layer keeps as few units as `choose_units` allows."""
    units = []
    for group in graph.groups:
        step, limit = _step(group, multiple)
        # The smallest number of units from the limit on that whole steps reach.
        kept = min(len(group.units), math.ceil(limit / step) * step)
        units += group.units[kept:]
    return graph.macs(mask_of(units, graph.count))


def _step(group: UnitGroup, multiple: int) -> tuple[int, int]:
    """Returns the number of units of a layer that go at once, and the number that stays in any case."""
    count = len(group.units)
    limit = max(1, math.ceil(group.dense_count * _MIN_SHARE))
    if multiple > 1 and group.dense_count >= 2 * multiple:
        return multiple, max(multiple, limit)
    return max(1, int(_STEP_SHARE * count)), limit


def _savings(graph: UnitGraph, removed: Tensor) -> Tensor:
    """Returns the multiply-adds that the removal of each unit alone saves."""
    savings = torch.zeros(graph.count, dtype=torch.float64)
    for layer in graph.multiplications:
        sides = [_counts(labels, removed) for labels in (layer.out_labels, layer.in_labels)]
        (outputs, all_outputs), (inputs, all_inputs) = sides
        savings += layer.factor * (outputs * all_inputs + inputs * all_outputs - outputs * inputs)
    return savings


def _counts(labels: Tensor, removed: Tensor) -> tuple[Tensor, int]:
    """Returns the number of remaining entries of each unit, and that of all remaining entries."""
    is_unit = labels != FIXED
    remaining = ~is_unit | ~removed[labels.clamp(min=0)]
    counts = torch.bincount(labels[is_unit & remaining], minlength=len(removed)).double()
    return counts, int(remaining.sum())
