"""How fast are convolutions of sequences as convolutions of images of height 1, next to torch's?

    python benchmarks/conv1d.py [--threads 2] [--seconds 1]

Each layer is measured forward and backward together, the convolution alone, and with a batch norm in training and a
ReLU. "kernel" reads and writes channels-last memory, as between two layers of a network; "kernel, contiguous" reads and
writes the memory of torch's sequences. Freed memory is kept, as in a job of lightkit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from layers import run
from torch import Tensor

from lightkit.ops import conv2d, norm_act


@dataclass(frozen=True)
class Layer:
    """A convolution of sequences."""

    batch: int
    inputs: int
    outputs: int
    length: int
    taps: int
    stride: int = 1

    def __str__(self) -> str:
        names = f"{self.inputs} -> {self.outputs}, {self.batch} x {self.length}, {self.taps} taps"
        return names if self.stride == 1 else f"{names}, stride {self.stride}"


LAYERS = [
    *(Layer(64, 1, 32, 128, 3), Layer(64, 32, 32, 128, 3), Layer(64, 32, 64, 128, 3), Layer(64, 64, 64, 128, 1)),
    *(Layer(64, 64, 64, 128, 3), Layer(64, 64, 64, 128, 5), Layer(32, 128, 128, 128, 3)),
    *(Layer(64, 12, 32, 500, 7, 2), Layer(32, 64, 128, 64, 3, 2), Layer(32, 16, 16, 1000, 9)),
]


def calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """Forward and backward of one layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    border = layer.taps // 2
    x = draw(layer.batch, layer.inputs, layer.length).requires_grad_()
    weight = (draw(layer.outputs, layer.inputs, layer.taps) / (layer.inputs * layer.taps) ** 0.5).requires_grad_()
    scale, shift = (draw(layer.outputs).requires_grad_() for _ in range(2))
    running = torch.zeros(layer.outputs), torch.ones(layer.outputs)
    image = x.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last).requires_grad_()

    def torchs() -> Tensor:
        return F.conv1d(x, weight, None, layer.stride, border)

    def kernel(input: Tensor) -> Tensor:
        return conv2d(input, weight.unsqueeze(2), None, (1, layer.stride), (0, border))

    def kernel_norm() -> Tensor:
        y, statistics = conv2d(image, weight.unsqueeze(2), None, (1, layer.stride), (0, border), statistics=True)
        return norm_act(y, scale, shift, *running, training=True, activation="relu", statistics=statistics)

    upstream = torch.randn_like(torchs(), requires_grad=False)
    last = upstream.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    affine = (scale, shift)
    return {
        "eager": lambda: torch.autograd.grad(torchs(), (x, weight), upstream),
        "kernel, contiguous": lambda: torch.autograd.grad(kernel(x.unsqueeze(2)).squeeze(2), (x, weight), upstream),
        "kernel": lambda: torch.autograd.grad(kernel(image), (image, weight), last),
        "norm, eager": lambda: torch.autograd.grad(
            F.relu(F.batch_norm(torchs(), *running, *affine, True)), (x, weight, *affine), upstream
        ),
        "norm, kernel": lambda: torch.autograd.grad(kernel_norm(), (image, weight, *affine), last),
    }


def eager_of(what: str) -> str:
    """Returns the way of torch with the same operations."""
    return "norm, eager" if what.startswith("norm") else "eager"


def main() -> None:
    layers = {str(layer): partial(calls, layer) for layer in LAYERS}
    run("conv1d", str(__doc__).splitlines()[0], layers, 1.0, eager_of=eager_of)


if __name__ == "__main__":
    main()
