"""The comparison of the kernels with torch on the first data that they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightkit.capture import torch_functions
from lightkit.capture.graph import Graph
from lightkit.capture.node import Node, Operand
from lightkit.capture.plan import Plan

_SAMPLES = 4
_ATTEMPTS = 3

# The error that torch is allowed at least, relative to the norm of the values: results that are exact by luck are no
# measure.
_LEAST_ERROR = 1e-6

# The same for operations that round to 8 bits: in either, a sum may move to the next level, which is a larger error.
_LEAST_LEVEL_ERROR = 2.0**-6


def find_fault(plan: Plan, nodes: Sequence[Node], seen: Sequence[int]) -> str | None:
    """Compares a plan with torch in float64, and says what is wrong with it.

    Outputs and gradients are computed three times, from the first samples of the data: by the plan, by torch, and by
    torch in float64. The error of a tensor is the norm of its difference from float64, relative to the norm of the
    tensor. The largest error of the plan may be twice the largest of torch. Where two inputs of a ReLU's or pool's
    choice are equal but for rounding, float32 and float64 choose differently, which says nothing about a kernel: after
    a failure the comparison is repeated with two batches of random numbers, and one success suffices.

    The comparison changes nothing that the program can see: it copies running statistics, random operations have their
    seeds, and torch's random generators are not used.

    Returns:
        None if the plan is as accurate as torch, or if values are not finite, which proves nothing; else a sentence.
    """
    fault = None
    for attempt in range(_ATTEMPTS):
        fault = _compare(plan, nodes, seen, attempt)
        if fault is None:
            break
    return fault


def _compare(plan: Plan, nodes: Sequence[Node], seen: Sequence[int], attempt: int) -> str | None:
    outputs = list(seen) or Graph(nodes, seen).needed[-1:]
    with torch.autocast("cpu", enabled=False):
        exact = _results(_by_torch, nodes, outputs, torch.float64, attempt)
        torchs = _results(_by_torch, nodes, outputs, None, attempt)
        ours = _results(plan.run, nodes, outputs, None, attempt)
    errors = [_largest_error(found, exact) for found in (ours, torchs)]
    if not all(map(_is_finite, exact)):
        return None
    has_levels = any(node.kind == "quantize" for node in nodes)
    limit = 2 * max(errors[1], _LEAST_LEVEL_ERROR if has_levels else _LEAST_ERROR)
    if errors[0] <= limit:
        return None
    return f"its error against float64, {errors[0]:.1e}, is more than twice torch's, {errors[1]:.1e}"


def _by_torch(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.value = torch_functions.run(node)


def _results(
    compute: Callable[[Sequence[Node]], None],
    nodes: Sequence[Node],
    outputs: Sequence[int],
    dtype: torch.dtype | None,
    attempt: int,
) -> list[Tensor]:
    """Returns the outputs and then the gradients of all tensors that need one, in float64."""
    copies = _Copies(nodes, dtype, attempt)
    with torch.inference_mode(False), torch.set_grad_enabled(bool(copies.leaves)):
        compute(copies.nodes)
        values = [copies.nodes[i].value for i in outputs]
        roots = [v for v in values if v is not None and v.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if roots:
            # The same for all three, in the order of the tensors' dimensions.
            generator = torch.Generator().manual_seed(attempt)
            upstream = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in roots]
            # Scalars have no upstream gradients, for which torch would import SymPy.
            products = [(value * gradient).sum() for value, gradient in zip(roots, upstream, strict=True)]
            gradients = torch.autograd.grad(products, copies.leaves, allow_unused=True)
    return [t.detach().double() for t in (*values, *gradients) if t is not None]


class _Copies:
    """Copies of operations on the first samples of their operands, or on random numbers."""

    def __init__(self, nodes: Sequence[Node], dtype: torch.dtype | None, attempt: int) -> None:
        self.nodes: list[Node] = []
        self.leaves: list[Tensor] = []
        self._dtype = dtype
        self._copied: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(attempt) if attempt else None
        for node in nodes:
            operands = tuple(self._operand(operand) for operand in node.operands)
            tensors = tuple(None if t is None else self._copy(t, t) for t in node.tensors)
            copy = Node(
                *(node.kind, operands, tensors, node.settings, node.shape, node.dtype, node.requires_grad, node.seed)
            )
            copy.index = node.index
            self.nodes.append(copy)

    def _operand(self, operand: Operand) -> Operand:
        if isinstance(operand, Node):
            return self.nodes[operand.index]
        return self._copy(operand, operand[:_SAMPLES], is_data=True)

    def _copy(self, original: Tensor, values: Tensor, is_data: bool = False) -> Tensor:
        if id(original) in self._copied:
            return self._copied[id(original)]
        with torch.inference_mode(False), torch.no_grad():
            # Copies are needed out of inference mode as well as of running statistics, which the operations write.
            copy = torch.empty_like(values.detach(), dtype=self._dtype or values.dtype)
            if is_data and self._generator is not None:
                copy.copy_(torch.randn(values.shape, generator=self._generator, dtype=torch.float64))
            else:
                copy.copy_(values)
        if original.requires_grad:
            copy.requires_grad_()
            self.leaves.append(copy)
        self._copied[id(original)] = copy
        return copy


def _largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    errors = [float((f - e).norm() / e.norm()) if e.norm() > 0 else float(f.norm()) for f, e in pairs]
    # NaN is larger than all numbers.
    return max((float("inf") if error != error else error for error in errors), default=0.0)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
