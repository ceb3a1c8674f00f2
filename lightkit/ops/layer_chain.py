"""Convolutions, ReLUs, pools and linear layers that follow each other, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit import native
from lightkit._util.compiler import assume_constant_result
from lightkit.errors import ArgumentError

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ChainLayer(NamedTuple):
    """A layer of a chain.

    Args:
        weight: ``(C_out, C, KH, KW)`` of a convolution, or ``(C_out, F)`` of a linear layer.
        bias: ``(C_out)``, or None.
        padding: of a convolution, zeros on each side of rows and columns.
        relu: whether a ReLU follows.
        pool: whether, after a convolution, a max-pool of 2x2 with stride 2 follows.
    """

    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, int] = (0, 0)
    relu: bool = True
    pool: bool = False


def layer_chain(input: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """Layers one after the other on a native CPU kernel: ``conv2d``, ``linear``, ``relu``, ``max_pool2d``.

    Convolutions have stride 1, no dilation and one group; a pool drops an odd last row or column, which is then not
    even computed. A linear layer takes what a convolution gives as if it were flattened, in the order ``(C, H, W)``. A
    thread takes its images through all layers while they are in its cache, and autograd has one node for all of them.
    Of the activations before a pool nothing is stored: one byte for each output tells backward which position won, the
    first of equals as in torch. backward leaves out nearly every product with a gradient that pool or ReLU made 0. The
    result does not depend on the number of threads.

    Under a pool, 3x3 kernels on whole vectors of channels (16, 32, ... in float32 with AVX-512) are computed by
    Winograd's F(2x2, 3x3), with about the error of the products themselves. There an infinite input makes NaN of what
    depends on it.

    Half-precision data is computed in float32 and rounded once, at the end; under autocast only the result is of its
    dtype. `layer_chain_reference` does the work where the kernel does not apply (another device, no native library,
    torch.func, tensor subclasses). The second derivative is torch's. Which layers are faster so than in torch,
    `is_faster` knows.

    NaN goes through ReLU and pool as in torch. Since products with 0 are left out of the gradients, but for that of the
    weight of few input channels, an infinite or NaN input or weight does not make NaN of a gradient that does not
    depend on it.

    Args:
        input: ``(N, C, H, W)``, or ``(N, F)`` before a linear layer, floating point. Read without a copy where it is
            ``torch.channels_last``, or has one channel.
        layers: the layers in order, at least one, with tensors of the dtype of ``input``.

    Returns:
        What the last layer gives: ``(N, C_out)`` of a linear layer, ``(N, C_out, H', W')`` of a convolution, whose
        memory format is ``torch.channels_last``, whatever that of ``input``, where the kernel did the work.

    Raises:
        ArgumentError: no layer, shapes that do not fit, a negative padding, an input too small for kernel and pool.
        RuntimeError: dtypes or devices that do not fit. Where there is no kernel, what torch's functions raise.
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
        # Autocast asks for no more precision than its dtype's: there may be more.
        with torch.autocast(input.device.type, enabled=False):
            output = layer_chain(input.float(), layers)
        return output.to(torch.get_autocast_dtype(input.device.type))
    settings = [number for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
    try:
        return torch.ops.lightkit.layer_chain.default(input, weights, biases, settings)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def layer_chain_reference(input: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """The same function in terms of torch's own, for what the kernel does not cover: see `layer_chain`."""
    x = input
    for layer in layers:
        if layer.weight.dim() == 2:
            x = F.linear(x.flatten(1), layer.weight, layer.bias)
        else:
            x = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
        x = F.relu(x) if layer.relu else x
        x = F.max_pool2d(x, 2) if layer.pool else x
    return x


def is_autocast(input: Tensor) -> bool:
    """Whether autocast has a convolution or a linear layer of it computed in another dtype."""
    device = input.device.type
    return (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and input.is_floating_point()
        and input.dtype != torch.float64
    )


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors, of which the first is the input."""
    return (
        tensors[0].dtype in _DTYPES
        and all(t.is_cpu and t.layout is torch.strided for t in tensors)
        # Linear layers without inputs or outputs are torch's; a convolution without channels is refused.
        and all(t.numel() > 0 for t in tensors[1:] if t.dim() != 4)
        and _native_available()
        # Forward-mode AD and the transforms of torch.func cannot see through an autograd function in C++.
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        # torch.jit.trace knows no list of tensors that may be None.
        and (torch.compiler.is_compiling() or not torch.jit.is_tracing())
        # DTensor and its like bring a dispatch of their own, which does not know the op.
        and all(type(t) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(t) for t in tensors)
    )


def is_faster(pixels: int, weight: Tensor, dtype: torch.dtype, pool: bool = False) -> bool:
    """Whether the kernel is faster than torch at a layer, forward and backward together; a linear one behind others.

    Measured by benchmarks/conv_relu_pool.py.

    Args:
        pixels: height times width of the input, without padding.
        weight: of the layer.
        dtype: what torch would compute in.
        pool: whether a pool follows.
    """
    size = weight.numel()
    if weight.dim() == 2:
        return size <= 1 << 17
    if size >= 1 << 26 or pixels * max(weight.shape[0], weight.shape[1]) >= 1 << 29:
        # More than it takes, or nearly.
        return False
    # With a pool most of the gradient is 0, and left out. A 1x1 convolution without one is a matrix product, in which
    # dead units are too few to make up for lists of the others.
    if not pool and (pixels > 256 or size > 1 << 16 or weight.shape[2] == weight.shape[3] == 1):
        return False
    return not (dtype == torch.bfloat16 and _multiplies_bfloat16()) or pixels * size <= 1 << 22


@assume_constant_result
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@assume_constant_result
def _native_available() -> bool:
    return native.available("cpu")
