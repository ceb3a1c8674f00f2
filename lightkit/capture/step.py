"""The interface of the steps that compute operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightkit.capture.node import Node


class Step(ABC):
    """Computes one or several operations.

    Args:
        indices: the indices of the operations; the last one is that whose value the step computes.

    Attributes:
        replacement: the name of lightkit's function; None if torch computes the step.
    """

    replacement: str | None = None

    def __init__(self, indices: tuple[int, ...]) -> None:
        self.indices = indices

    @abstractmethod
    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the value of the last operation; the values of the operands from outside the step are known."""
