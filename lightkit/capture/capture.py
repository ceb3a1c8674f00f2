"""The way in which recorded operations run, found once for each sequence of operations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightkit.capture.calls import Calls
from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.capture.plan import Plan, make_plan
from lightkit.capture.proof import find_fault

# Each plan is a list of small objects. The limit keeps a program whose operations never repeat from growing.
_MAX_PLANS = 256

# The operations that are named if torch computes them.
_REPORTED = frozenset({"conv1d", "conv2d", "batch_norm"})
_TORCHS = "torch is faster for these sizes, or lightkit has no kernel for these settings"


@dataclass(frozen=True)
class Region:
    """Operations of a module that lightkit found together.

    Args:
        names: the names of the modules whose parameters take part.
        operations: the names of the operations, in order.
        replacement: the name of the function of lightkit that computes them; None if torch does.
        reason: the reason why torch computes them; None if lightkit does.
    """

    names: tuple[str, ...]
    operations: tuple[str, ...]
    replacement: str | None = None
    reason: str | None = None


_NO_NODE = Node("none", (), (), (), (), torch.float32, False)


class Capture:
    """Runs calls of modules so that lightkit's kernels compute the operations that they can.

    The first time that a sequence of operations occurs, `lightkit.capture.proof.find_fault` compares the kernels with
    torch on a few samples of the data at hand. Torch computes what does not pass.

    Args:
        names: the names of modules by the ``id`` of their parameters and buffers.
        on_region: receives each new region.

    Attributes:
        calls: the calls that have been recorded.
        unused: objects that stood for values and can stand for others, by shape and dtype.
    """

    def __init__(
        self, names: Mapping[int, str] | None = None, on_region: Callable[[Region], None] = lambda region: None
    ) -> None:
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._names = names or {}
        self._on_region = on_region
        self._regions: dict[Region, None] = {}
        self.calls = Calls()
        self.unused: dict[Any, list[Deferred]] = {}

    def keep_unused(self, node: Node, handle: Deferred) -> None:
        """Keeps an object that stood for the value of an operation, and that nothing else refers to."""
        if len(self.unused) < _MAX_PLANS:
            handle.node = _NO_NODE
            self.unused.setdefault((node.shape, node.dtype), []).append(handle)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions that were found up to now."""
        return tuple(self._regions)

    def note(self, operation: str, replacement: str) -> None:
        """Reports a function of torch that lightkit computed at once."""
        self._add(Region((), (operation,), replacement))

    def run(self, nodes: Sequence[Node], seen: Sequence[int]) -> None:
        """Computes operations.

        Args:
            nodes: the operations in the order of the program.
            seen: the indices of those whose values the program can still see.
        """
        key = (tuple(node.key for node in nodes), tuple(seen), torch.is_grad_enabled())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._find(nodes, seen)
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        plan.run(nodes)

    def _find(self, nodes: Sequence[Node], seen: Sequence[int]) -> Plan:
        plan = make_plan(nodes, seen)
        fault = find_fault(plan, nodes, seen) if plan.has_kernels else None
        by_torch = [i for step in plan.steps if step.replacement is None for i in step.indices]
        for step in plan.steps:
            if step.replacement is not None:
                self._report(nodes, step.indices, None if fault else step.replacement, fault)
        if any(nodes[i].kind in _REPORTED for i in by_torch):
            self._report(nodes, by_torch, None, _TORCHS)
        return plan if fault is None else make_plan(nodes, seen, kernels=False)

    def _report(
        self, nodes: Sequence[Node], indices: Sequence[int], replacement: str | None, reason: str | None
    ) -> None:
        tensors = [tensor for i in indices for tensor in nodes[i].tensors if tensor is not None]
        names = dict.fromkeys(self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names)
        region = Region(tuple(names), tuple(nodes[i].kind for i in indices), replacement, reason)
        self._add(region)

    def _add(self, region: Region) -> None:
        if region not in self._regions:
            self._regions[region] = None
            self._on_region(region)
