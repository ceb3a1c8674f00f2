"""A chain of convolutions and linear layers on 8-bit integers, as one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit import native
from lightkit.errors import ArgumentError

# Sums are int32.
_MAX_SUM = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Int8Layer:
    """A layer of an `Int8Chain`: a convolution or a linear layer, and what follows it.

    A middle layer computes from its inputs ``q``, with the zero point ``z`` of the layer before, for each channel ``c``
    of its output::

        sum = bias[c] + sum of (q - z) * weight[c]
        q_out = clamp(rint(float32(sum) * multiplier[c]) + output_zero_point, low, 255)

    ``low`` is ``output_zero_point`` with a ReLU and 0 without one. A max-pool follows if ``pool``. The last layer
    returns ``float32(sum) * multiplier[c]``, behind its ReLU and pool, as float32. ``rint`` rounds to the nearest even
    integer.

    Args:
        weight: int8 from -127 to 127: ``(C_out, C / groups, KH, KW)`` of a convolution, or ``(C_out, F)`` of a linear
            layer.
        bias: int32, ``(C_out)``: in units of the sum, which is the scale of the inputs times that of the weights.
        multiplier: float32, ``(C_out)``, positive and finite: the unit of the sum over the unit of the output, which is
            1 for the last layer.
        stride: the step of the kernel for height and width; likewise the pairs ``padding`` and ``dilation``.
        padding: the number of values on each side of the image that stand for 0: they are the zero point.
        dilation: the distance of the kernel's points.
        groups: the number of groups that the channels are divided into.
        relu: True adds a ReLU.
        pool: True adds a 2x2 max-pool of stride 2 behind the ReLU; an odd last row or column is dropped. Only for a
            convolution.
        output_zero_point: the integer of the output, from 0 to 255, that stands for 0. The last layer ignores it.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    relu: bool = False
    pool: bool = False
    output_zero_point: int = 0

    @property
    def is_linear(self) -> bool:
        """True for a linear layer, False for a convolution."""
        return self.weight.dim() == 2


class Int8Chain:
    """A network of 8-bit layers that runs on a CPU in one native call, with exact integer sums.

    The results have the same bits on every processor and for any number of threads: sums are integers, and the
    operations in float32 are single ones, each rounded once. A thread takes a few images through all layers while they
    are in its cache. The kernels use the instructions of VNNI if the processor has them, and multiply 16-bit integers
    elsewhere. Depthwise convolutions are correct, and slow.

    The weights are packed once, here. A copy or a pickle of the chain has the layers, and packs them anew. Without a
    native library, `int8_chain_reference` computes the same bits in torch's operations, many times more slowly.

    An image becomes integers as in :func:`torch.fake_quantize_per_tensor_affine`: ``clamp(rint(x * (1 / input_scale)) +
    input_zero_point, 0, 255)``, in float32. Infinite values become 0 or 255, and NaN becomes 0.

    Args:
        layers: the layers in order, at least one, on the CPU: convolutions, and then linear layers. A linear layer
            behind a convolution reads the values in the order ``(C, H, W)``, as :class:`torch.nn.Flatten` gives them.
        input_scale: the step between two integers of the images; in float32 it and its inverse are positive and finite.
        input_zero_point: the integer, from 0 to 255, that stands for 0 in the images.

    Raises:
        ArgumentError: a tensor has another dtype, device, shape or range, layers do not fit each other, a setting is
            out of its range, or a sum of a layer could exceed 32 bits.
    """

    def __init__(self, layers: Sequence[Int8Layer], input_scale: float, input_zero_point: int) -> None:
        self.layers = tuple(layers)
        self.input_scale = float(input_scale)
        self.input_zero_point = input_zero_point
        _check_layers(self.layers, input_zero_point)
        _check_scale(self.input_scale)
        self._plan = _plan_of(self.layers, input_zero_point)
        self._packed: Tensor | None = None
        if native.available():
            parameters = zip(*((layer.weight, layer.bias, layer.multiplier) for layer in self.layers), strict=True)
            try:
                self._packed = torch.ops.lightkit.int8_chain_pack.default(*map(list, parameters), self._plan)
            except ValueError as error:
                raise ArgumentError(str(error)) from None
        self._flattens = self.layers[0].is_linear

    def __call__(self, input: Tensor) -> Tensor:
        """Returns the output of the last layer, float32, without a gradient.

        Args:
            input: float32 on the CPU, of any strides: ``(N, C, H, W)``, or ``(N, F)`` before a linear layer, which also
                takes images and flattens them. The kernel reads it without a copy.

        Returns:
            ``(N, C_out)`` of a linear layer, ``(N, C_out, H', W')`` of a convolution as ``torch.channels_last``.

        Raises:
            ArgumentError: ``input`` has another dtype, device or number of dimensions, another number of channels or
                features, or is too small for a kernel and its pool.
        """
        if not input.is_cpu:
            raise ArgumentError(f"Int8Chain: input must be on the CPU, got {input.device}")
        if self._flattens and input.dim() > 2:
            input = input.flatten(1)
        if self._packed is None:
            return int8_chain_reference(input, self.layers, self.input_scale, self.input_zero_point)
        try:
            return torch.ops.lightkit.int8_chain.default(input, self._packed, self._plan, self.input_scale)
        except ValueError as error:
            raise ArgumentError(str(error)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.layers, self.input_scale, self.input_zero_point)


def int8_chain_reference(
    input: Tensor, layers: Sequence[Int8Layer], input_scale: float, input_zero_point: int
) -> Tensor:
    """Computes an `Int8Chain` in torch's operations, with the same bits: sums of integers are exact in float64.

    Args:
        input: float32, ``(N, C, H, W)``, or ``(N, F)`` before a linear layer.
        layers: the layers, of which `Int8Chain` has checked the values.
        input_scale: as of `Int8Chain`.
        input_zero_point: as of `Int8Chain`.

    Returns:
        The output of the last layer, float32.

    Raises:
        ArgumentError: ``input`` does not fit the layers.
    """
    _check_input(input, layers)
    input = input.detach()
    inverse = 1 / torch.tensor(input_scale, dtype=torch.float32)
    zero_point = input_zero_point
    q = ((input * inverse).nan_to_num(-256.0).round() + zero_point).clamp(0, 255)
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        # Padding with 0 behind the subtraction is padding with the zero point.
        sums = _sums(q.double() - zero_point, layer)
        channels = (-1,) if layer.is_linear else (-1, 1, 1)
        y = sums.to(torch.int32).float() * layer.multiplier.view(channels)
        if index == last:
            q = y.relu() if layer.relu else y
        else:
            zero_point = layer.output_zero_point
            q = (y.round() + zero_point).clamp(zero_point if layer.relu else 0, 255)
        q = F.max_pool2d(q, 2) if layer.pool else q
    return q


def _sums(x: Tensor, layer: Int8Layer) -> Tensor:
    weight, bias = layer.weight.double(), layer.bias.double()
    if layer.is_linear:
        return F.linear(x.flatten(1), weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _plan_of(layers: Sequence[Int8Layer], input_zero_point: int) -> list[int]:
    """Returns the numbers of a chain, as csrc/ops/int8_chain/int8_chain.h describes them."""
    plan = [input_zero_point]
    for layer in layers:
        out_channels, in_channels, *kernel = layer.weight.shape
        window = (*layer.stride, *layer.padding, *layer.dilation, layer.groups)
        plan += [layer.is_linear, out_channels, in_channels * layer.groups, *(kernel or (1, 1)), *window]
        plan += [layer.relu, layer.pool, layer.output_zero_point]
    return [int(number) for number in plan]


def _check_scale(input_scale: float) -> None:
    scale = torch.tensor(input_scale, dtype=torch.float32)
    if not (0 < scale < float("inf") and 0 < 1 / scale < float("inf")):
        raise ArgumentError(
            "Int8Chain: input_scale must be positive and finite in float32, and so must be its inverse, "
            f"got {input_scale}"
        )


def _check_layers(layers: Sequence[Int8Layer], input_zero_point: int) -> None:
    if not layers:
        raise ArgumentError("Int8Chain: there must be at least one layer")
    _check_zero_point("Int8Chain: input_zero_point", input_zero_point)
    zero_point = input_zero_point
    for index, layer in enumerate(layers):
        where = f"Int8Chain: layer {index}"
        _check_tensors(where, layer)
        _check_settings(where, layer)
        if index > 0:
            _check_neighbours(where, layers[index - 1], layer)
        _check_range(where, layer, zero_point)
        zero_point = layer.output_zero_point


def _check_zero_point(name: str, value: int) -> None:
    if type(value) is not int or not 0 <= value <= 255:
        raise ArgumentError(f"{name} must be an int from 0 to 255, got {value!r}")


def _check_tensors(where: str, layer: Int8Layer) -> None:
    dtypes = {"weight": torch.int8, "bias": torch.int32, "multiplier": torch.float32}
    for name, dtype in dtypes.items():
        tensor = getattr(layer, name)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or not tensor.is_cpu:
            found = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ArgumentError(f"{where}: {name} must be {dtype} on the CPU, got {found}")
    shape = tuple(layer.weight.shape)
    if layer.weight.dim() not in (2, 4) or layer.weight.numel() == 0:
        raise ArgumentError(f"{where}: weight must have 4 dimensions, or 2 of a linear layer, and values, got {shape}")
    for name in ("bias", "multiplier"):
        if getattr(layer, name).shape != shape[:1]:
            raise ArgumentError(f"{where}: {name} must have shape {shape[:1]}, got {tuple(getattr(layer, name).shape)}")


def _check_settings(where: str, layer: Int8Layer) -> None:
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        pair = getattr(layer, name)
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int and n >= least for n in pair)):
            raise ArgumentError(f"{where}: {name} must be a pair of ints from {least} up, got {pair!r}")
    _check_zero_point(f"{where}: output_zero_point", layer.output_zero_point)
    if type(layer.groups) is not int or layer.groups < 1 or layer.weight.shape[0] % layer.groups:
        raise ArgumentError(
            f"{where}: groups must divide the {layer.weight.shape[0]} output channels, got {layer.groups!r}"
        )
    window = (*layer.stride, *layer.padding, *layer.dilation, layer.groups, bool(layer.pool))
    if layer.is_linear and window != (1, 1, 0, 0, 1, 1, 1, False):
        raise ArgumentError(f"{where}: a linear layer has no stride, padding, dilation, groups or pool")


def _check_neighbours(where: str, previous: Int8Layer, layer: Int8Layer) -> None:
    if previous.is_linear and not layer.is_linear:
        raise ArgumentError(f"{where}: a convolution cannot follow a linear layer")
    channels, found = previous.weight.shape[0], layer.weight.shape[1] * layer.groups
    flattens = layer.is_linear and not previous.is_linear
    if found % channels if flattens else found != channels:
        expected = f"a multiple of {channels}" if flattens else str(channels)
        raise ArgumentError(f"{where}: the number of input channels must be {expected}, got {found}")


def _check_range(where: str, layer: Int8Layer, zero_point: int) -> None:
    if layer.weight.min() < -127:
        raise ArgumentError(f"{where}: weight must be from -127 to 127, got {layer.weight.min()}")
    valid = layer.multiplier.isfinite() & (layer.multiplier > 0)
    if not valid.all():
        wrong = layer.multiplier[~valid][0].item()
        raise ArgumentError(f"{where}: multiplier must be positive and finite, got {wrong}")
    # The extreme sums of the output channels: each input is 0 or 255, by the sign of its weight.
    weight, bias = layer.weight.flatten(1).long(), layer.bias.long()
    positive, negative = weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1)
    above, below = 255 - zero_point, zero_point
    largest = int((bias + positive * above - negative * below).max())
    least = int((bias - positive * below + negative * above).min())
    if largest > _MAX_SUM or least < -_MAX_SUM - 1:
        raise ArgumentError(f"{where}: sums must fit 32 bits, but bias and weight allow from {least} to {largest}")


def _check_input(input: Tensor, layers: Sequence[Int8Layer]) -> None:
    """Raises an ArgumentError unless the layers take the input, whose sizes after each layer it computes."""
    first = layers[0]
    dimensions, channels = (2 if first.is_linear else 4), first.weight.shape[1] * first.groups
    if input.dtype != torch.float32:
        raise ArgumentError(f"int8_chain: the input must be float32, got {input.dtype}")
    if input.dim() != dimensions or input.shape[1] != channels:
        raise ArgumentError(
            f"int8_chain: the input must have {dimensions} dimensions and {channels} "
            f"{'features' if first.is_linear else 'channels'}, got shape {tuple(input.shape)}"
        )
    image = list(input.shape[2:])
    for index, layer in enumerate(layers):
        where = f"int8_chain: layer {index}"
        if layer.is_linear:
            for size in image:
                channels *= size
            if channels != layer.weight.shape[1]:
                raise ArgumentError(f"{where}: the input must have {layer.weight.shape[1]} features, got {channels}")
            image = []
        else:
            image = _convolved(where, image, layer)
        channels = layer.weight.shape[0]


def _convolved(where: str, image: list[int], layer: Int8Layer) -> list[int]:
    """Returns height and width of a convolution's output, behind its pool."""
    sizes = []
    for axis in range(2):
        padded = image[axis] + 2 * layer.padding[axis]
        reach = layer.dilation[axis] * (layer.weight.shape[2 + axis] - 1) + 1
        if image[axis] < 1 or padded < reach + layer.pool * layer.stride[axis]:
            raise ArgumentError(
                f"{where}: an input of {image[0]}x{image[1]} with padding {layer.padding} is too small for a kernel of "
                f"{tuple(layer.weight.shape[2:])} with dilation {layer.dilation}{' and a pool' if layer.pool else ''}"
            )
        sizes.append(((padded - reach) // layer.stride[axis] + 1) // (2 if layer.pool else 1))
    return sizes
