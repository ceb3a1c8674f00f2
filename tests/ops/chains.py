"""Chains of layers to compute, by lightkit's ops and by their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import lightkit.native
from lightkit.ops import (
    ChainLayer,
    conv_relu_pool,
    conv_relu_pool_reference,
    layer_chain,
    layer_chain_reference,
)

# For torch.ops.lightkit.
lightkit.native.load()

Function = Callable[[Tensor, Sequence[ChainLayer]], Tensor]


def make(input_shape, plan, dtype=torch.float32, images=3, seed=0) -> tuple[Tensor, list[ChainLayer]]:
    """Input and layers of a plan, with sums of about 1.

    The plan has (channels, kernel, padding, pool, relu, bias) of a convolution, (features, relu, bias) of a linear one.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    input, layers = draw(images, *input_shape).to(dtype), []
    channels, *size = input_shape
    for step in plan:
        if len(step) == 3:
            out, relu, bias = step
            fan_in = channels * (size[0] * size[1] if size else 1)
            weight, padding, pool = draw(out, fan_in), (0, 0), False
            size = []
        else:
            out, kernel, padding, pool, relu, bias = step
            fan_in = channels * kernel[0] * kernel[1]
            weight = draw(out, channels, *kernel)
            size = [s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel, strict=True)]
            size = [s // 2 for s in size] if pool else size
            if min(size) < 1:
                raise ValueError("nothing is left of the images")
        weight = (weight * fan_in**-0.5).to(dtype)
        layers.append(ChainLayer(weight, draw(out).mul(0.3).to(dtype) if bias else None, padding, relu, pool))
        channels = out
    return input, layers


def tensors_of(layers: Sequence[ChainLayer]) -> list[Tensor]:
    """The weights, then the biases that there are."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers if layer.bias is not None]


def with_tensors(layers: Sequence[ChainLayer], tensors: Sequence[Tensor]) -> list[ChainLayer]:
    """The layers with other tensors in the order of `tensors_of`."""
    biases = list(tensors[len(layers) :])
    return [
        layer._replace(weight=weight, bias=None if layer.bias is None else biases.pop(0))
        for layer, weight in zip(layers, tensors, strict=False)
    ]


def leaves_of(input, layers) -> tuple[Tensor, list[ChainLayer], list[Tensor]]:
    """Copies of all tensors that want gradients, and the layers of these."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (input, *tensors_of(layers))]
    return leaves[0], with_tensors(layers, leaves[1:]), leaves


def upstream_of(output: Tensor) -> Tensor:
    """A gradient that is different everywhere."""
    return torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos().to(output.dtype)


def results(function: Function, input, layers) -> list[Tensor]:
    """Output and gradients of a sum of it, weighted differently everywhere."""
    input, layers, tensors = leaves_of(input, layers)
    output = function(input, layers)
    return [output, *torch.autograd.grad(output, tensors, upstream_of(output))]


def settings_of(layers: Sequence[ChainLayer]) -> list[int]:
    return [int(number) for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]


def chain_arguments(input, layers) -> tuple:
    """The arguments of the op `lightkit::layer_chain`."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return input, weights, biases, settings_of(layers), [layer.output_scale for layer in layers]


def native_chain(input, layers) -> Tensor:
    """The op itself: the public function may hand the work to torch where that is faster."""
    return torch.ops.lightkit.layer_chain(*chain_arguments(input, layers))


def block_arguments(input, layers) -> tuple:
    """The arguments of the op `lightkit::conv_relu_pool` for a chain of one layer."""
    (layer,) = layers
    return input, layer.weight, layer.bias, layer.padding, layer.pool


def native_block(input, layers) -> Tensor:
    return torch.ops.lightkit.conv_relu_pool(*block_arguments(input, layers))


def public_block(input, layers) -> Tensor:
    return conv_relu_pool(*block_arguments(input, layers))


def block_reference(input, layers) -> Tensor:
    return conv_relu_pool_reference(*block_arguments(input, layers))


class Subject:
    """A plan, and what computes it: `conv_relu_pool` with its one layer, or `layer_chain`."""

    def __init__(self, shape, plan, is_block: bool = False) -> None:
        self.shape, self.plan = shape, plan
        self.op = torch.ops.lightkit.conv_relu_pool if is_block else torch.ops.lightkit.layer_chain
        self.arguments = block_arguments if is_block else chain_arguments
        self.native: Function = native_block if is_block else native_chain
        self.public: Function = public_block if is_block else layer_chain
        self.reference: Function = block_reference if is_block else layer_chain_reference

    def make(self, dtype=torch.float32, images=3) -> tuple[Tensor, list[ChainLayer]]:
        return make(self.shape, self.plan, dtype, images)


CNN = [
    (32, (3, 3), (0, 0), True, True, True),
    (64, (3, 3), (0, 0), True, True, True),
    (64, (3, 3), (0, 0), False, True, True),
    (64, True, True),
    (10, False, True),
]
PADDED = [
    (16, (3, 3), (1, 1), True, True, True),
    (17, (3, 3), (1, 1), True, True, False),
    (8, (5, 3), (2, 0), False, True, True),
    (9, (2, 2), (0, 1), True, False, True),
]
LINEAR = [(7, True, True), (33, False, False), (5, True, True)]
PLANS = {"cnn": ((1, 28, 28), CNN), "padded": ((3, 19, 16), PADDED), "linear": ((20,), LINEAR)}


def block(channels, out_channels, size=(9, 8), padding=(0, 0), pool=True, bias=True) -> Subject:
    """A convolution of 3x3, ReLU and perhaps a pool."""
    return Subject((channels, *size), [(out_channels, (3, 3), padding, pool, True, bias)], is_block=True)
