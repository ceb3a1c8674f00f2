"""Two-dimensional convolution on a native CPU kernel, with the statistics of its output."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops import _thresholds
from lightkit.ops._dispatch import is_autocast, kernels_apply

_Pair = int | tuple[int, int]


@overload
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    stride: _Pair = ...,
    padding: _Pair = ...,
    dilation: _Pair = ...,
    groups: int = ...,
    *,
    statistics: Literal[False] = ...,
) -> Tensor: ...


@overload
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    stride: _Pair = ...,
    padding: _Pair = ...,
    dilation: _Pair = ...,
    groups: int = ...,
    *,
    statistics: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    stride: _Pair = ...,
    padding: _Pair = ...,
    dilation: _Pair = ...,
    groups: int = ...,
    *,
    statistics: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    *,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `torch.nn.functional.conv2d` on a native CPU kernel, and on request the statistics of its output.

    3x3 convolutions of stride 1 and dilation 1 on whole vectors of input channels (16, 32, ... in float32 with AVX-512)
    use Winograd's F(2x2, 3x3), forward and backward: it takes 4/9 of the multiplications, and has about the error of
    direct products. In these layers, an infinite or NaN input makes NaN of all outputs of its 2x2 tile. All others are
    computed directly. The result does not depend on the number of threads.

    `conv2d_reference` takes calls that the kernel does not: another device or dtype, autocast, no native library,
    torch.func, tensor subclasses, an input of three dimensions, ``padding`` as a string. The second derivative is
    torch's. `conv2d_is_faster` tells which layers are faster on the kernel.

    Args:
        input: ``(N, C, H, W)``, float32 or float64. The kernel reads it without a copy if it is ``torch.channels_last``
            or has at most three channels.
        weight: ``(C_out, C / groups, KH, KW)``, of the dtype of ``input``.
        bias: ``(C_out)``, of the dtype of ``input``; None adds no bias.
        stride: the step of the kernel, an int or a pair for height and width; likewise ``padding`` and ``dilation``.
        padding: the number of zeros on each side of the image.
        dilation: the distance of the kernel's points.
        groups: the number of groups that the channels are divided into.
        statistics: True also returns the statistics of the output, which the kernel computes while the output is in
            the cache. They take no part in autograd: a caller that uses them adds their gradient to the output's.

    Returns:
        ``(N, C_out, H', W')`` as ``torch.channels_last``, for any memory format of ``input``. With ``statistics``, also
        ``(2, C_out)``: mean and biased variance of each channel over images, rows and columns; float32 for half
        precision, else of the dtype of ``input``.

    Raises:
        ArgumentError: the shapes do not fit, a size is negative or 0, or ``input`` is too small for the kernel.
        RuntimeError: the tensors have different dtypes or devices. Without a kernel, torch's functions raise their own
            errors.
    """
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not has_kernel(*tensors) or isinstance(padding, str):
        return conv2d_reference(input, weight, bias, stride, padding, dilation, groups, statistics=statistics)
    settings = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups)
    try:
        output, moments = torch.ops.lightkit.conv2d.default(input, weight, bias, *settings, statistics)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return (output, moments) if statistics else output


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    *,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `conv2d` in torch's operations, for calls that the kernel does not take."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # vmap has no memory formats.
    if output.dim() == 4 and not torch._C._are_functorch_transforms_active():
        output = output.contiguous(memory_format=torch.channels_last)
    if not statistics:
        return output
    values = output.detach()
    values = values if values.dtype == torch.float64 else values.float()
    variance, mean = torch.var_mean(values, (-1, -2) if values.dim() == 3 else (0, 2, 3), correction=0)
    return output, torch.stack([mean, variance])


def has_kernel(*tensors: Tensor) -> bool:
    """Returns True if the kernel takes these tensors, of which the first is the input and the second the weight."""
    input, weight = tensors[:2]
    return (
        input.dtype in (torch.float32, torch.float64)
        and all(t.is_cpu and t.layout is torch.strided for t in tensors)
        and input.dim() == weight.dim() == 4
        and weight.numel() > 0
        and not is_autocast(input)
        and kernels_apply(*tensors)
    )


def conv2d_is_faster(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Returns True if a convolution, forward and backward together, is faster on the kernel than in torch.

    The peer is torch on contiguous or on channels-last tensors, whichever is faster. benchmarks/conv2d.py measures the
    speeds; `lightkit.ops._thresholds` has the limits.

    Args:
        input_shape: ``(N, C, H, W)``.
        weight_shape: ``(C_out, C / groups, KH, KW)``.
        stride: the step of the kernel, an int or a pair; likewise ``padding`` and ``dilation``.
        padding: the number of zeros on each side of the image.
        dilation: the distance of the kernel's points.
        groups: the number of groups.
        dtype: the dtype that torch would compute in.
    """
    if dtype not in (torch.float32, torch.float64) or len(input_shape) != 4:
        return False
    sizes = [
        (size + 2 * pad - step * (taps - 1) - 1) // by + 1
        for size, taps, by, pad, step in zip(
            input_shape[2:],
            weight_shape[2:],
            _pair("stride", stride),
            _pair("padding", padding),
            _pair("dilation", dilation),
            strict=True,
        )
    ]
    images = [prod(input_shape[1:]), weight_shape[0] * prod(sizes)]
    if prod(weight_shape) >= _thresholds.MAX_WEIGHTS or max(images) >= _thresholds.MAX_IMAGE:
        return False
    if groups > 1 and min(weight_shape[1], weight_shape[0] // groups) < _thresholds.MIN_CONV2D_GROUP:
        return False
    return (
        prod(weight_shape) <= _thresholds.MAX_CONV2D_WEIGHTS
        and prod(weight_shape[2:]) <= _thresholds.MAX_CONV2D_TAPS
        and max(_pair("dilation", dilation)) == 1
    )


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        # As in torch, one number in a sequence is for both.
        pair *= 2
    if len(pair) != 2:
        raise ArgumentError(f"conv2d: {name} must be an int or a pair of ints, got {value!r}")
    return pair[0], pair[1]
