"""Translates calls of torch's convolutions into operations that can wait.

A convolution of sequences has the settings of one of images of height 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightkit.capture.arguments import as_hashable, as_operand, as_pair, find_product_dtype
from lightkit.capture.node import Node
from lightkit.capture.recorder import Context, Recorder, requires_grad


def _recorder(kind: str, dims: int) -> Recorder:
    """Returns the recorder of a convolution of inputs of ``dims`` dimensions."""

    def record(
        context: Context,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Node | None:
        operand = as_operand(input)
        if operand is None or len(operand.shape) != dims or not isinstance(weight, Tensor) or weight.dim() != dims:
            return None
        dtype = find_product_dtype(context, operand, weight, bias)
        if dtype is None:
            return None
        arguments = (as_hashable(stride), as_hashable(padding), as_hashable(dilation), groups)
        found = _sizes(tuple(operand.shape), tuple(weight.shape), *arguments)
        if found is None:
            return None
        settings, shape = found
        wants = requires_grad(context, operand, weight, bias)
        return Node(kind, (operand,), (weight, bias), settings, shape, dtype, wants)

    return Recorder(record)


@lru_cache(maxsize=1024)
def _sizes(
    size: tuple[int, ...], weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """Returns the settings of a convolution in pairs, and the shape of its output; None if torch refuses the call."""
    is_sequence = len(size) == 3
    steps, gaps = as_pair(stride, is_sequence), as_pair(dilation, is_sequence)
    if 0 in weight or steps is None or gaps is None or min(*steps, *gaps, groups) < 1:
        return None
    batch, channels = size[:2]
    image, kernel = ((1, size[2]), (1, weight[2])) if is_sequence else (size[2:], weight[2:])
    named = _padding_by_name(padding, kernel, steps, gaps) if isinstance(padding, str) else None
    borders = named if isinstance(padding, str) else as_pair(padding, is_sequence, of_height=0)
    if borders is None or min(borders) < 0 or weight[1] * groups != channels or weight[0] % groups != 0:
        return None
    out = output_sizes(image, kernel, steps, borders, gaps)
    if min(out) < 1:
        return None
    return (steps, borders, gaps, groups), (batch, weight[0], *(out[1:] if is_sequence else out))


def output_sizes(image: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Returns the height and the width behind a convolution or a pool with these settings in pairs."""
    return [
        (size + 2 * border - gap * (k - 1) - 1) // step + 1
        for size, k, step, border, gap in zip(image, kernel, stride, padding, dilation, strict=True)
    ]


def _padding_by_name(padding: str, kernel: Any, stride: Any, dilation: Any) -> tuple[int, int] | None:
    """Returns the zeros on each side for ``"valid"`` and ``"same"``; None where they are unequal or torch refuses."""
    if padding == "valid":
        return 0, 0
    totals = [gap * (k - 1) for k, gap in zip(kernel, dilation, strict=True)]
    if padding != "same" or stride != (1, 1) or any(total % 2 for total in totals):
        return None
    return totals[0] // 2, totals[1] // 2


CONVOLUTION_RECORDERS: Mapping[Any, Recorder] = {
    torch.conv2d: _recorder("conv2d", 4),
    torch.conv1d: _recorder("conv1d", 3),
}
