"""Dropout that `lightkit.ops.dropout` computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightkit.capture.graph import Graph
from lightkit.capture.node import Node
from lightkit.capture.step import Step
from lightkit.ops.dropout import dropout


class DropoutStep(Step):
    """Computes a dropout by `lightkit.ops.dropout`."""

    replacement = "lightkit.ops.dropout"

    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the output, of an input in contiguous memory: the mask depends on the order of the memory."""
        node = nodes[self.indices[0]]
        return dropout(node.operand().contiguous(), *node.settings, seed=node.seed)


def find_dropout(graph: Graph, start: int) -> DropoutStep | None:
    """Returns the step of a dropout; None for another operation."""
    return DropoutStep((start,)) if graph.nodes[start].kind == "dropout" else None
