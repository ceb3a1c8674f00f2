"""Which operations read the values of which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightkit.capture.node import Node


class Graph:
    """Operations with those that read their values.

    Args:
        nodes: the operations in the order of the program.
        seen: the indices of those whose values the program can still see.

    Attributes:
        taken: the indices of the operations that belong to a step.
        needed: the indices of the operations that must run, in order: those whose values are seen, those that update
            running statistics, and those before them.
    """

    def __init__(self, nodes: Sequence[Node], seen: Iterable[int]) -> None:
        self.nodes = nodes
        self.seen = frozenset(seen)
        self.taken: set[int] = set()
        self.needed = self._find_needed()
        self._readers: dict[int, list[int]] = {i: [] for i in self.needed}
        for i in self.needed:
            for source in self.sources((i,)):
                self._readers[source].append(i)

    def sources(self, indices: Sequence[int]) -> list[int]:
        """Returns the operations outside of ``indices`` whose values these operations read."""
        return [
            operand.index
            for i in indices
            for operand in self.nodes[i].operands
            if isinstance(operand, Node) and operand.index not in indices and self.nodes[operand.index] is operand
        ]

    def only_reader(self, index: int) -> Node | None:
        """Returns the operation that reads a value.

        Returns:
            None if several operations do, if the program sees the value, or if the operation belongs to a step.
        """
        readers = self._readers[index]
        if len(readers) != 1 or index in self.seen or readers[0] in self.taken:
            return None
        return self.nodes[readers[0]]

    def _find_needed(self) -> list[int]:
        needed: set[int] = set()
        for node in reversed(self.nodes):
            if node.index in self.seen or node.index in needed or _writes(node):
                needed.add(node.index)
                needed.update(operand.index for operand in node.operands if isinstance(operand, Node))
        return sorted(needed)


def _writes(node: Node) -> bool:
    # Running statistics are the first tensor and the first setting of a batch norm in training.
    return node.kind == "batch_norm" and node.settings[0] and node.tensors[0] is not None
