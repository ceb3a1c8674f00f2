"""Removes units from a model in place, with the state that optimizers keep of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightkit.compress.tracing import evaluating, trace
from lightkit.compress.units import HasInnerUnits, UnitAxis, UnitGraph, UnitGroup, is_removed, mask_of, named_tensors
from lightkit.compress.widths import has_widths, replace_data, update_attributes
from lightkit.optim import masks_of

# The largest difference of a proof, relative to the largest output: other orders of sums round differently.
_TOLERANCE = 1e-3


def remove_units(
    root: nn.Module,
    graph: UnitGraph,
    removed: Tensor,
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Removes units from a module in place.

    Parameters stay the same objects, with smaller shapes and without gradients. Of the state of an optimizer, tensors
    of the shape of their parameter lose the same entries; the other tensors of such a state do not fit any more, and
    the optimizer begins that parameter's state anew.

    Args:
        root: the traced module.
        graph: the units of the module: see `lightkit.compress.tracing.trace`.
        removed: True for each unit that is removed, bool of the size ``graph.count``.
        optimizers: the optimizers of the parameters, whose masks lose the same entries: see `lightkit.optim.set_masks`.
    """
    optimizers = list(optimizers)
    tensors = named_tensors(root)
    for name, changes in graph.kept_indices(removed).items():
        tensor = tensors[name]
        before = tensor.shape
        replace_data(tensor, _select(tensor.detach(), changes))
        for optimizer in optimizers:
            masks = masks_of(optimizer)
            if tensor in masks:
                masks[tensor] = _select(masks[tensor], changes)
            if tensor in optimizer.state:
                _select_state(optimizer.state[tensor], before, changes)
    _update(root)


def _select_state(state: dict[str, Any], shape: torch.Size, changes: Sequence[tuple[int, Tensor]]) -> None:
    parts = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    if any(value.shape != shape for value in parts.values()):
        state.clear()
        return
    for name, value in parts.items():
        state[name] = _select(value, changes)


def _select(tensor: Tensor, changes: Sequence[tuple[int, Tensor]]) -> Tensor:
    for axis, indices in changes:
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor.contiguous()


def provable_graph(root: nn.Module, arguments: Sequence[Any], options: dict[str, Any] | None = None) -> UnitGraph:
    """Returns the units of a module whose removal computes what is expected, by an experiment with one batch.

    For each layer, the function removes every other unit, and compares the output with that of the whole module in
    which nothing reads these units. It leaves out layers for which this fails, such as one whose size stands in the
    user's code. A layer norm in between takes its mean over the remaining units, so that the outputs differ; then the
    removal must only run. The module is the same to the bit afterwards.

    Args:
        root: the module.
        arguments: positional arguments of ``forward``.
        options: keyword arguments of ``forward``.
    """
    graph = trace(root, arguments, options)
    if not graph.groups or _is_proven(root, graph, graph.groups, arguments, options):
        return graph
    failed = [group for group in graph.groups if not _is_proven(root, graph, [group], arguments, options)]
    return graph.without_groups({group.name: "the model fails without some of its units" for group in failed})


@torch.no_grad()
def _is_proven(
    root: nn.Module,
    graph: UnitGraph,
    groups: Sequence[UnitGroup],
    arguments: Sequence[Any],
    options: dict[str, Any] | None,
) -> bool:
    removed = mask_of((unit for group in groups for unit in group.units[1::2]), graph.count)
    tensors = named_tensors(root)
    cleared = {axis.name: _cleared(tensors[axis.name], axis, removed) for axis in graph.axes if axis.reads}
    smaller = {name: _select(tensors[name].detach(), kept) for name, kept in graph.kept_indices(removed).items()}
    with evaluating(root):
        try:
            with _exchanged(root, cleared):
                expected = _tensors(root.forward(*arguments, **(options or {})))
            with _exchanged(root, smaller):
                found = _tensors(root.forward(*arguments, **(options or {})))
        except Exception:
            # The code of the user may do anything with another size.
            return False
    if len(expected) != len(found):
        return False
    modules = dict(root.named_modules())
    if all(isinstance(modules.get(group.name), HasInnerUnits) for group in groups):
        # The state behind the first output, such as keys and values of heads, has a part for each inner unit.
        pairs = list(zip(expected, found, strict=True))
        kept = [(x, y) for place, (x, y) in enumerate(pairs) if place == 0 or x.shape == y.shape]
        expected, found = [x for x, _ in kept], [y for _, y in kept]
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    if _is_normalized(root, graph, removed):
        return True
    return all(
        bool((x - y).abs().max() <= _TOLERANCE * (1e-6 + y.abs().max()))
        for x, y in zip(found, expected, strict=True)
        if x.is_floating_point() and x.numel() > 0
    )


def _is_normalized(root: nn.Module, graph: UnitGraph, removed: Tensor) -> bool:
    """Returns True if a layer norm takes its statistics over units that are removed."""
    layers = {name for name, module in root.named_modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))}
    return any(
        axis.name.rpartition(".")[0] in layers and bool(is_removed(axis.labels, removed).any()) for axis in graph.axes
    )


def _cleared(tensor: Tensor, axis: UnitAxis, removed: Tensor) -> Tensor:
    """Returns a copy of a tensor that reads nothing of the removed units."""
    indices = is_removed(axis.labels, removed).nonzero().flatten().to(tensor.device)
    return tensor.detach().clone().index_fill_(axis.axis, indices, 0)


@contextmanager
def _exchanged(root: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Exchanges tensors of a module within the context.

    The parameters themselves stay as they are: strategies have hooks at them.
    """
    own = named_tensors(root)
    try:
        for name, tensor in tensors.items():
            _put(
                root, name, nn.Parameter(tensor, requires_grad=False) if isinstance(own[name], nn.Parameter) else tensor
            )
        _update(root)
        yield
    finally:
        for name in tensors:
            _put(root, name, own[name])
        _update(root)


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    # Recurrent layers keep a list of their weights, which a new attribute renews.
    setattr(root.get_submodule(path), own, tensor)


def _update(root: nn.Module) -> None:
    for module in root.modules():
        if has_widths(module):
            update_attributes(module)


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]
