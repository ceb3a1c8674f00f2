"""Convolution, bias, ReLU and max-pool as one operation that stores only what the pool lets through."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit import native

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def conv_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    pool: bool = True,
) -> Tensor:
    """``max_pool2d(relu(conv2d(input, weight, bias, padding=padding)), 2)`` on a native CPU kernel.

    The convolution has stride 1, no dilation and one group; the pool is 2x2 with stride 2 and drops an odd last row
    or column, which is then not even computed. Of the activations before the pool nothing is stored: one byte for
    each output tells backward which position won, the first of equals as in torch. backward leaves out nearly every
    product with a gradient that pool or ReLU made 0. The kernel's result does not depend on the number of threads.

    Half-precision data is accumulated in float32 and rounded once. `conv_relu_pool_reference` does the work where the
    kernel does not apply (another device, no native library, torch.func, tensor subclasses), and where torch is the
    faster one: without a pool for 1x1 kernels and all but small images and weights, and in bfloat16, on a processor
    that multiplies it, for all but small layers. The second derivative is torch's.

    NaN goes through ReLU and pool as in torch. Since products with 0 are left out of the kernel's gradients, but for
    that of the weight of few input channels, an infinite or NaN input or weight does not make NaN of a gradient that
    does not depend on it.

    Args:
        input: ``(N, C, H, W)``, floating point. Read without a copy where it is ``torch.channels_last``.
        weight: ``(C_out, C, KH, KW)``, of the dtype of ``input``.
        bias: ``(C_out)`` of that dtype, or None.
        padding: zeros on each side, for rows and columns or both.
        pool: whether the pool follows.

    Returns:
        ``(N, C_out, H', W')`` with ``H' = H + 2 padding - KH + 1``, halved (rounded down) by the pool. Its memory
        format is ``torch.channels_last``, whatever that of ``input``, where the kernel did the work.

    Raises:
        ValueError: shapes that do not fit, a negative padding, or an input too small for kernel and pool.
        RuntimeError: dtypes or devices that do not fit.
    """
    padding = _pair(padding)
    if _autocast(input.device.type) and input.is_floating_point() and input.dtype != torch.float64:
        # As torch does for a convolution.
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if _has_kernel(input, weight, bias) and _is_faster(input, weight, pool):
        # It checks its arguments as `_check` does.
        return torch.ops.lightkit.conv_relu_pool.default(input, weight, bias, padding, pool)
    _check(input, weight, bias, padding, pool)
    return conv_relu_pool_reference(input, weight, bias, padding, pool)


def conv_relu_pool_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    pool: bool = True,
) -> Tensor:
    """The same function in terms of torch's own, for what the kernel does not cover: see `conv_relu_pool`."""
    output = F.relu(F.conv2d(input, weight, bias, padding=padding))
    return F.max_pool2d(output, 2) if pool else output


def _pair(padding: int | tuple[int, int]) -> tuple[int, int]:
    pair = (padding, padding) if isinstance(padding, int) else padding
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(p, int) for p in pair)):
        raise ValueError(f"conv_relu_pool: padding must be one or two whole numbers, got {padding!r}")
    if min(pair) < 0:
        raise ValueError(f"conv_relu_pool: padding must not be negative, got {padding!r}")
    return pair[0], pair[1]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], pool: bool) -> None:
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "conv_relu_pool: input and weight must have 4 dimensions, (N, C, H, W) and (C_out, C, KH, KW), "
            f"got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"conv_relu_pool: the weight is for {weight.shape[1]} channels but the input has {input.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"conv_relu_pool: the bias must hold one value for each of the {weight.shape[0]} output channels, "
            f"got shape {tuple(bias.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"conv_relu_pool: the weight must not be empty, got shape {tuple(weight.shape)}")
    least = 2 if pool else 1
    for size, kernel, pad in zip(input.shape[2:], weight.shape[2:], padding, strict=True):
        if size + 2 * pad - kernel + 1 < least:
            raise ValueError(
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


def _autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _has_kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return (
        all(t.device.type == "cpu" and t.layout == torch.strided for t in tensors)
        and input.dtype in _DTYPES
        and _native_available()
        # Forward-mode AD and the transforms of torch.func cannot see through an autograd function in C++.
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        # DTensor and its like bring a dispatch of their own, which does not know the op.
        and all(type(t) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(t) for t in tensors)
    )


def _is_faster(input: Tensor, weight: Tensor, pool: bool) -> bool:
    """Whether the kernel is, of forward and backward together: see benchmarks/conv_relu_pool.py."""
    # Not Size.numel(), which makes constants of sizes that torch.export has been told to leave open.
    pixels, size = math.prod(input.shape[2:]), math.prod(weight.shape)
    if size >= 1 << 26:
        # More than it takes.
        return False
    # With a pool most of the gradient is 0, and left out. A 1x1 convolution without one is a matrix product, in which
    # dead units are too few to make up for lists of the others.
    if not pool and (pixels > 256 or size > 1 << 16 or math.prod(weight.shape[2:]) == 1):
        return False
    return not (input.dtype == torch.bfloat16 and _multiplies_bfloat16()) or pixels * size <= 1 << 21


@torch.compiler.assume_constant_result
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.compiler.assume_constant_result
def _native_available() -> bool:
    return native.available("cpu")
