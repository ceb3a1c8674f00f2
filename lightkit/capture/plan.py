"""The steps that compute a sequence of operations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightkit.capture import torch_functions
from lightkit.capture.chain import find_chain
from lightkit.capture.dropout import find_dropout
from lightkit.capture.graph import Graph
from lightkit.capture.node import Node, is_channels_last
from lightkit.capture.norm import find_norm
from lightkit.capture.step import Step


class TorchStep(Step):
    """Computes one operation by torch."""

    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the value of the operation."""
        return torch_functions.run(nodes[self.indices[0]])


class Plan:
    """The steps in the order in which they run.

    Args:
        steps: the steps.
        contiguous: the indices of the operations whose values torch would return in contiguous memory.
        last_uses: for each step, the indices of the operations whose values no later step reads and nobody sees.
    """

    def __init__(self, steps: Sequence[Step], contiguous: frozenset[int], last_uses: Sequence[tuple[int, ...]]) -> None:
        self.steps = tuple(steps)
        self.has_kernels = any(step.replacement is not None for step in steps)
        self._contiguous = contiguous
        self._last_uses = tuple(last_uses)

    def run(self, nodes: Sequence[Node]) -> None:
        """Computes the operations; sets ``value`` of those that the program sees."""
        for step, unused in zip(self.steps, self._last_uses, strict=True):
            index = step.indices[-1]
            value = step.run(nodes)
            nodes[index].finish(value.contiguous() if index in self._contiguous else value)
            for i in unused:
                nodes[i].value = None


def make_plan(nodes: Sequence[Node], seen: Sequence[int], kernels: bool = True) -> Plan:
    """Finds the steps for operations.

    Args:
        nodes: the operations in the order of the program.
        seen: the indices of those whose values the program can still see.
        kernels: False lets torch compute all of them.
    """
    graph = Graph(nodes, seen)
    step_of: dict[int, Step] = {}
    steps: list[Step] = []
    for index in graph.needed:
        if index in step_of:
            continue
        step = (_find_kernel(graph, index) if kernels else None) or TorchStep((index,))
        steps.append(step)
        graph.taken.update(step.indices)
        step_of.update(dict.fromkeys(step.indices, step))
    ordered = _in_order(graph, steps, step_of)
    return Plan(ordered, _contiguous(graph), _last_uses(graph, ordered))


def _find_kernel(graph: Graph, index: int) -> Step | None:
    """Returns the step by which lightkit's kernels compute an operation and those behind it; None for torch."""
    for find in (find_chain, find_norm, find_dropout):
        if (step := find(graph, index)) is not None:
            return step
    return None


def _in_order(graph: Graph, steps: Sequence[Step], step_of: dict[int, Step]) -> list[Step]:
    """Returns the steps so that each comes after those that compute its operands."""
    ordered: dict[Step, None] = {}
    for step in steps:
        _put_in_order(graph, step, step_of, ordered)
    return list(ordered)


def _put_in_order(graph: Graph, step: Step, step_of: dict[int, Step], ordered: dict[Step, None]) -> None:
    if step not in ordered:
        for before in graph.sources(step.indices):
            _put_in_order(graph, step_of[before], step_of, ordered)
        ordered[step] = None


def _contiguous(graph: Graph) -> frozenset[int]:
    """Returns the operations of which a program may ask the memory format, in which torch keeps that of the input.

    Values of three dimensions are always contiguous: they have no memory format, and a program may call ``view``.
    """
    channels_last: set[int] = set()
    for node in graph.nodes:
        tensors = [t for t in (*node.operands, *node.tensors) if isinstance(t, Tensor)]
        before = [operand.index for operand in node.operands if isinstance(operand, Node)]
        if any(map(is_channels_last, tensors)) or not channels_last.isdisjoint(before):
            channels_last.add(node.index)
    images = {i for i in graph.seen - channels_last if len(graph.nodes[i].shape) == 4}
    return frozenset(images.union(i for i in graph.seen if len(graph.nodes[i].shape) == 3))


def _last_uses(graph: Graph, steps: Sequence[Step]) -> list[tuple[int, ...]]:
    last: dict[int, int] = {}
    for place, step in enumerate(steps):
        for source in graph.sources(step.indices):
            last[source] = place
    return [tuple(i for i, at in last.items() if at == place and i not in graph.seen) for place in range(len(steps))]
