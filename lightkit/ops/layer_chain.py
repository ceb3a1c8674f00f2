"""Consecutive convolutions, ReLUs, pools and linear layers as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit._util.compiler import assume_constant_result
from lightkit.errors import ArgumentError
from lightkit.ops import _thresholds
from lightkit.ops._dispatch import is_autocast, kernels_apply

# The largest level of a rounded output.
MAX_LEVEL = 255


class ChainLayer(NamedTuple):
    """A layer of a chain.

    Args:
        weight: ``(C_out, C, KH, KW)`` for a convolution, or ``(C_out, F)`` for a linear layer.
        bias: ``(C_out)``; None adds no bias.
        padding: the number of zeros on each side of the height and of the width of a convolution's input.
        relu: True adds a ReLU.
        pool: True adds a 2x2 max-pool of stride 2; only for a convolution.
        output_scale: rounds the output of a layer with a ReLU to 0, 1, ..., 255 times this float32 number, as
            `torch.fake_quantize_per_tensor_affine` does; 0 leaves the output as it is. No gradient flows to outputs
            above the last of these values.
    """

    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, int] = (0, 0)
    relu: bool = True
    pool: bool = False
    output_scale: float = 0.0


def layer_chain(input: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """Computes consecutive layers on a native CPU kernel: ``conv2d``, ``linear``, ``relu``, ``max_pool2d``.

    Convolutions have stride 1, no dilation and one group. A pool drops an odd last row or column, which is not
    computed. A linear layer flattens the output of a convolution in the order ``(C, H, W)``. A thread takes its images
    through all layers while they are in its cache, and autograd has one node for all layers. Activations before a pool
    are not stored: one byte for each output keeps the argmax of its window, the first of equals as in torch. backward
    leaves out nearly every product with a gradient that pool or ReLU made 0. The result does not depend on the number
    of threads.

    Before a pool, 3x3 convolutions on whole vectors of channels (16, 32, ... in float32 with AVX-512) use Winograd's
    F(2x2, 3x3), with about the error of direct products. In these layers, an infinite input makes NaN of the outputs
    that depend on it.

    Half-precision data is computed in float32 and rounded once, at the end; under autocast only the result has
    autocast's dtype. `layer_chain_reference` takes calls that the kernel does not (another device, no native library,
    torch.func, tensor subclasses). The second derivative is torch's. `is_faster` tells which layers are faster on the
    kernel.

    NaN goes through ReLU and pool as in torch. The gradients leave out products with 0, except for the weight of a
    layer with few input channels: an infinite or NaN input or weight does not make NaN of a gradient that does not
    depend on it.

    Args:
        input: ``(N, C, H, W)``, or ``(N, F)`` before a linear layer, floating point. The kernel reads an input without
            a copy if the input is ``torch.channels_last`` or has one channel.
        layers: the layers in order, at least one, with tensors of the dtype of ``input``.

    Returns:
        The output of the last layer: ``(N, C_out)`` of a linear layer, ``(N, C_out, H', W')`` of a convolution. The
        kernel returns a convolution's output as ``torch.channels_last``, for any memory format of ``input``.

    Raises:
        ArgumentError: ``layers`` is empty, shapes do not fit, a padding is negative, the input of a layer is too small
            for kernel and pool, or a layer without a ReLU has an ``output_scale``.
        RuntimeError: dtypes or devices do not fit. Without a kernel, torch's functions raise their own errors.
    """
    if not layers:
        raise ArgumentError("layer_chain: there must be at least one layer")
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    parameters = [*weights, *(bias for bias in biases if bias is not None)]
    if not has_kernel(input, *parameters):
        return layer_chain_reference(input, layers)
    if is_autocast(input):
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            return layer_chain_reference(input, layers)
        # float32 is more precise than autocast's dtype.
        with torch.autocast(input.device.type, enabled=False):
            output = layer_chain(input.float(), layers)
        return output.to(torch.get_autocast_dtype(input.device.type))
    return run_kernel(input, weights, biases, *kernel_settings(layers))


def kernel_settings(layers: Sequence[ChainLayer]) -> tuple[list[int], list[float]]:
    """Returns the settings of layers as `run_kernel` takes them."""
    settings = [int(number) for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
    scales = [layer.output_scale for layer in layers]
    return settings, scales if any(scales) else []


def run_kernel(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    settings: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Computes `layer_chain` of tensors for which `has_kernel` returns True, without autocast."""
    try:
        return torch.ops.lightkit.layer_chain.default(input, weights, biases, settings, scales)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def layer_chain_reference(input: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """Computes `layer_chain` in torch's operations, for calls that the kernel does not take."""
    x = input
    for layer in layers:
        if layer.weight.dim() == 2:
            x = F.linear(x.flatten(1), layer.weight, layer.bias)
        else:
            x = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
        x = F.relu(x) if layer.relu else x
        x = F.max_pool2d(x, 2) if layer.pool else x
        if layer.output_scale:
            x = torch.fake_quantize_per_tensor_affine(x, layer.output_scale, 0, 0, MAX_LEVEL)
    return x


def has_kernel(*tensors: Tensor) -> bool:
    """Returns True if the kernel takes these tensors, of which the first is the input."""
    return (
        all(t.is_cpu and t.layout is torch.strided for t in tensors)
        # Linear layers without inputs or outputs are torch's; a convolution without channels is an error.
        and all(t.numel() > 0 for t in tensors[1:] if t.dim() != 4)
        and kernels_apply(*tensors)
        # torch.jit.trace does not support a list of optional tensors.
        and (torch.compiler.is_compiling() or not torch.jit.is_tracing())
    )


def is_faster(pixels: int, weight: Tensor, dtype: torch.dtype, pool: bool = False) -> bool:
    """Returns True if a layer, forward and backward together, is faster on the kernel than in torch.

    benchmarks/conv_relu_pool.py measures the speeds; `lightkit.ops._thresholds` has the limits.

    Args:
        pixels: height times width of the unpadded input; it has no effect for a linear layer.
        weight: the weight of a convolution, or of a linear layer behind one.
        dtype: the dtype that torch would compute in.
        pool: True if a pool follows the layer.
    """
    weights = weight.numel()
    if weight.dim() == 2:
        return weights <= _thresholds.MAX_LINEAR_WEIGHTS
    if weights >= _thresholds.MAX_WEIGHTS or pixels * max(weight.shape[0], weight.shape[1]) >= _thresholds.MAX_IMAGE:
        return False
    # Under a pool, backward leaves out most products. A 1x1 convolution without one is a matrix product, in which the
    # products with dead outputs are too few to pay for lists of the others.
    if not pool and (
        pixels > _thresholds.MAX_UNPOOLED_PIXELS
        or weights > _thresholds.MAX_UNPOOLED_WEIGHTS
        or weight.shape[2] == weight.shape[3] == 1
    ):
        return False
    multiplies = dtype == torch.bfloat16 and _multiplies_bfloat16()
    return not multiplies or pixels * weights <= _thresholds.MAX_BFLOAT16_PRODUCTS


@assume_constant_result
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
