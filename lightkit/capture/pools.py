"""Translates calls of torch's max-pools, average pools and means into operations that can wait.

A pool of sequences has the settings of one of images of height 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.capture.arguments import as_hashable, as_pair
from lightkit.capture.convolutions import output_sizes
from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.capture.recorder import Context, Recorder, requires_grad


def _max_pool(kind: str, dims: int) -> Recorder:
    """Returns the recorder of a max-pool of inputs of ``dims`` dimensions."""

    def record(
        context: Context,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Node | None:
        if type(input) is not Deferred or ceil_mode or return_indices or len(input.node.shape) != dims:
            return None
        node = input.node
        found = _max_pool_sizes(node.shape, *map(as_hashable, (kernel_size, stride, padding, dilation)))
        if found is None:
            return None
        settings, shape = found
        return Node(kind, (node,), (), settings, shape, node.dtype, requires_grad(context, node))

    return Recorder(record)


@lru_cache(maxsize=1024)
def _max_pool_sizes(
    size: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """Returns the settings of a pool in pairs, and the shape of its output; None if torch refuses the call."""
    is_sequence = len(size) == 3
    kernel, steps = as_pair(kernel_size, is_sequence), _steps(stride, kernel_size, is_sequence)
    borders, gaps = as_pair(padding, is_sequence, of_height=0), as_pair(dilation, is_sequence)
    if kernel is None or steps is None or borders is None or gaps is None or min(*kernel, *steps, *gaps) < 1:
        return None
    if min(borders) < 0 or any(2 * border > k for border, k in zip(borders, kernel, strict=True)):
        return None
    out = output_sizes((1, size[2]) if is_sequence else size[2:], kernel, steps, borders, gaps)
    return None if min(out) < 1 else ((kernel, steps, borders, gaps), (*size[:2], *(out[1:] if is_sequence else out)))


def _steps(stride: Any, kernel_size: Any, is_sequence: bool) -> tuple[int, int] | None:
    """Returns the steps of a pool, which are the sizes of its windows unless they are given."""
    return as_pair(kernel_size if stride is None or stride == () else stride, is_sequence)


def _adaptive_mean(dims: int) -> Recorder:
    """Returns the recorder of an adaptive average pool to one value."""

    def record(context: Context, input: Any, output_size: Any) -> Node | None:
        if type(input) is not Deferred or len(input.node.shape) != dims or as_pair(output_size, dims == 3) != (1, 1):
            return None
        return _mean(context, input, tuple(range(2, dims)), keepdim=True)

    return Recorder(record)


def _average_pool(dims: int) -> Recorder:
    """Returns the recorder of an average pool whose one window is the whole image."""

    def record(
        context: Context,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Node | None:
        if type(input) is not Deferred or len(input.node.shape) != dims or divisor_override is not None:
            return None
        is_sequence = dims == 3
        image = input.node.shape[2:]
        steps = _steps(as_hashable(stride), kernel_size, is_sequence)
        if (
            as_pair(kernel_size, is_sequence) != ((1, *image) if is_sequence else image)
            or as_pair(padding, is_sequence, of_height=0) != (0, 0)
            or steps is None
            or min(steps) < 1
        ):
            return None
        return _mean(context, input, tuple(range(2, dims)), keepdim=True)

    return Recorder(record)


def _mean(context: Context, input: Any, dim: Any = None, keepdim: bool = False) -> Node | None:
    if type(input) is not Deferred or len(input.node.shape) not in (3, 4) or context.autocast is not None:
        return None
    node = input.node
    dims = tuple(range(2, len(node.shape)))
    given = (dim,) if isinstance(dim, int) else dim
    if not isinstance(given, (tuple, list)) or sorted(d % len(node.shape) for d in given) != list(dims):
        return None
    shape = (*node.shape[:2], *(1 for _ in dims)) if keepdim else node.shape[:2]
    return Node("mean", (node,), (), (dims, bool(keepdim)), shape, node.dtype, requires_grad(context, node))


POOL_RECORDERS: Mapping[Any, Recorder] = {
    **{function: _max_pool("max_pool2d", 4) for function in (F.max_pool2d, torch.max_pool2d)},
    **{function: _max_pool("max_pool1d", 3) for function in (F.max_pool1d, torch.max_pool1d)},
    F.adaptive_avg_pool2d: _adaptive_mean(4),
    torch.adaptive_avg_pool1d: _adaptive_mean(3),
    F.avg_pool2d: _average_pool(4),
    torch.avg_pool1d: _average_pool(3),
    torch.mean: Recorder(_mean),
    Tensor.mean: Recorder(_mean),
}
