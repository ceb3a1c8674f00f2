"""Convolution, bias, ReLU and max-pool as one operation, which stores nothing before the pool."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops._dispatch import is_autocast
from lightkit.ops.layer_chain import has_kernel, is_faster


def conv_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    pool: bool = True,
) -> Tensor:
    """Computes ``max_pool2d(relu(conv2d(input, weight, bias, padding=padding)), 2)`` on a native CPU kernel.

    The kernel computes a chain of one layer: see `lightkit.ops.layer_chain`. The gradient flows to all tensors. The
    function calls `conv_relu_pool_reference`, which runs torch's operations, in these cases:

    - `has_kernel` is False, as for tensors on a GPU;
    - the layer is faster in torch, because its image or weight is large;
    - ``pool`` is False and the weight is 1x1, or the image or the weight is not small;
    - the dtype is bfloat16, the processor has bfloat16 instructions, and the layer is not small.

    `lightkit.ops._thresholds` has the sizes. Under autocast the function casts all tensors to the autocast dtype first,
    as torch does for a convolution.

    Args:
        input: ``(N, C, H, W)``, floating point. The kernel reads a ``torch.channels_last`` input without a copy.
        weight: ``(C_out, C, KH, KW)``, of the dtype of ``input``.
        bias: ``(C_out)``, of the dtype of ``input``; None adds no bias.
        padding: the number of zeros on each side of the image: an int, or a pair for height and width.
        pool: True computes the maximum of each 2x2 square; False returns the output of the ReLU.

    Returns:
        ``(N, C_out, H', W')`` with ``H' = H + 2 padding - KH + 1``, halved (rounded down) by the pool. The kernel
        returns it as ``torch.channels_last``, for any memory format of ``input``; the reference returns torch's format.

    Raises:
        ArgumentError: the shapes do not fit, ``padding`` is negative, or ``input`` is too small for kernel and pool.
        RuntimeError: the tensors have different dtypes or devices.
    """
    padding = _pair(padding)
    if is_autocast(input):
        # As torch does for a convolution.
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if has_kernel(*tensors) and is_faster(math.prod(input.shape[2:]), weight, input.dtype, pool):
        try:
            # The op checks its arguments as `_check` does.
            return torch.ops.lightkit.conv_relu_pool.default(input, weight, bias, padding, pool)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
    _check(input, weight, bias, padding, pool)
    return conv_relu_pool_reference(input, weight, bias, padding, pool)


def conv_relu_pool_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    pool: bool = True,
) -> Tensor:
    """Computes `conv_relu_pool` in torch's operations, for calls that the kernel does not take."""
    output = F.relu(F.conv2d(input, weight, bias, padding=padding))
    return F.max_pool2d(output, 2) if pool else output


def _pair(padding: int | tuple[int, int]) -> tuple[int, int]:
    pair = (padding, padding) if isinstance(padding, int) else padding
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(p, int) for p in pair)):
        raise ArgumentError(f"conv_relu_pool: padding must be one or two whole numbers, got {padding!r}")
    if min(pair) < 0:
        raise ArgumentError(f"conv_relu_pool: padding must not be negative, got {padding!r}")
    return pair[0], pair[1]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], pool: bool) -> None:
    if input.dim() != 4 or weight.dim() != 4:
        raise ArgumentError(
            "conv_relu_pool: input and weight must have 4 dimensions, (N, C, H, W) and (C_out, C, KH, KW), "
            f"got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[1] != input.shape[1]:
        raise ArgumentError(
            f"conv_relu_pool: the weight is for {weight.shape[1]} channels but the input has {input.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"conv_relu_pool: the bias must hold one value for each of the {weight.shape[0]} output channels, "
            f"got shape {tuple(bias.shape)}"
        )
    if weight.numel() == 0:
        raise ArgumentError(f"conv_relu_pool: the weight must not be empty, got shape {tuple(weight.shape)}")
    least = 2 if pool else 1
    for size, kernel, pad in zip(input.shape[2:], weight.shape[2:], padding, strict=True):
        if size + 2 * pad - kernel + 1 < least:
            raise ArgumentError(
                f"conv_relu_pool: an input of {input.shape[2]}x{input.shape[3]} with padding {padding} is too small "
                f"for a kernel of {weight.shape[2]}x{weight.shape[3]}{' and a pool of 2x2' if pool else ''}"
            )
    if not input.is_floating_point():
        raise RuntimeError(f"conv_relu_pool: the input must be floating point, got {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.device != input.device or tensor.dtype != input.dtype):
            raise RuntimeError(
                f"conv_relu_pool: the {name} must be of the dtype and on the device of the input, {input.dtype} on "
                f"{input.device}, got {tensor.dtype} on {tensor.device}"
            )
