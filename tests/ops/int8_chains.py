"""Chains of 8-bit layers with random values, and their arithmetic in integers of 64 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.ops import Int8Layer


def layer(generator: torch.Generator, *shape: int, **settings: object) -> Int8Layer:
    """Returns a layer with a weight of a shape, whose outputs spread over all of 8 bits."""
    out, fan_in = shape[0], max(1, torch.Size(shape[1:]).numel())
    weight = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    bias = torch.randint(-9000, 9000, (out,), generator=generator).to(torch.int32)
    # The sums of such weights and inputs have a deviation of about 74 * 147 * sqrt(fan_in).
    multiplier = (0.5 + torch.rand(out, generator=generator)) * 80 / (74 * 147 * fan_in**0.5)
    return Int8Layer(weight, bias, multiplier, **settings)


def cnn(seed: int = 0) -> list[Int8Layer]:
    """Returns the layers of `lightkit.models.CNN` for images of 28x28."""
    generator = torch.Generator().manual_seed(seed)
    return [
        layer(generator, 32, 1, 3, 3, relu=True, pool=True),
        layer(generator, 64, 32, 3, 3, relu=True, pool=True),
        layer(generator, 64, 64, 3, 3, relu=True),
        layer(generator, 64, 576, relu=True),
        layer(generator, 10, 64),
    ]


def exact(input: Tensor, layers: Sequence[Int8Layer], input_scale: float, input_zero_point: int) -> Tensor:
    """Computes a chain with sums of int64, and one operation of torch for each operation in float32."""
    scale = torch.tensor(input_scale, dtype=torch.float32)
    q = (torch.round(input * (1 / scale)) + input_zero_point).clamp(0, 255).long()
    zero_point = input_zero_point
    for index, item in enumerate(layers):
        sums = _sums(q - zero_point, item)
        assert sums.numel() == 0 or sums.abs().max() < 2**31
        y = sums.to(torch.int32).float() * item.multiplier.view(-1, *[1] * (sums.dim() - 2))
        if index < len(layers) - 1:
            zero_point = item.output_zero_point
            y = (torch.round(y) + zero_point).clamp(0, 255)
            y = y.clamp(min=zero_point) if item.relu else y
        elif item.relu:
            y = y.clamp(min=0)
        y = F.max_pool2d(y, 2) if item.pool else y
        q = y if index == len(layers) - 1 else y.long()
    return q


def _sums(x: Tensor, item: Int8Layer) -> Tensor:
    """Returns the sums of a layer, int64, as products of matrices of its patches."""
    weight, bias = item.weight.long(), item.bias.long()
    if item.is_linear:
        return x.flatten(1) @ weight.T + bias
    kernel = weight.shape[2:]
    # Patches are copies: float64 has them exactly.
    patches = F.unfold(x.double(), kernel, item.dilation, item.padding, item.stride).long()
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // stride + 1
        for size, p, d, k, stride in zip(x.shape[2:], item.padding, item.dilation, kernel, item.stride, strict=True)
    )
    taps = weight[0].numel()
    products = weight.view(item.groups, -1, taps) @ patches.view(x.shape[0], item.groups, taps, rows * columns)
    return products.reshape(x.shape[0], weight.shape[0], rows, columns) + bias.view(-1, 1, 1)
