"""How fast are activation functions behind a batch norm, or in front of a pool, next to torch's operations?

    python benchmarks/activations.py [--threads 2] [--seconds 1]

Each layer is measured forward and backward together: a batch norm in training, an activation function, and a 2x2
max-pool or none; or the function and the pool without a batch norm; or the function alone, of the output of a linear
layer. Peers: torch eager on contiguous and on
channels-last data, and "norm alone", where the kernel computes the batch norm and torch what follows. The kernel's data
are channels-last. Freed memory is kept, as in a job of lightkit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from layers import run
from torch import Tensor

from lightkit.ops import ACTIVATIONS, norm_act, norm_act_reference
from lightkit.ops.activation import as_activation


@dataclass(frozen=True)
class Layer:
    """An activation function and what is around it."""

    shape: tuple[int, ...]
    activation: str
    norm: bool
    pool: bool

    def __str__(self) -> str:
        names = ["norm" if self.norm else "", self.activation, "pool" if self.pool else ""]
        return ", ".join(["x".join(map(str, self.shape)), *filter(None, names)])


SHAPES = ((64, 16, 32, 32), (64, 32, 16, 16), (8, 64, 8, 8))
LAYERS = [
    Layer(shape, activation, norm, pool)
    for shape in SHAPES
    for norm, pool in ((True, False), (True, True), (False, True))
    for activation in ACTIVATIONS
]
LAYERS += [Layer((64, width), "gelu_tanh", False, False) for width in (128, 512, 1024)]
LAYERS += [Layer((2048, 512), activation, False, False) for activation in ACTIVATIONS]


def calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """Forward and backward of one layer."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(layer.shape, generator=generator)
    channels = layer.shape[1]
    running = torch.zeros(channels), torch.ones(channels)
    function = as_activation(layer.activation)
    assert function is not None

    def torchs(x: Tensor, *affine: Tensor) -> Tensor:
        if layer.norm:
            return norm_act_reference(x, *affine, *running, training=True, activation=function, pool=layer.pool)
        return F.max_pool2d(function(x), 2) if layer.pool else function(x)

    def kernel(x: Tensor, *affine: Tensor) -> Tensor:
        if layer.norm:
            return norm_act(x, *affine, *running, training=True, activation=function, pool=layer.pool)
        return norm_act(x, None, None, *running, training=False, eps=0.0, activation=function, pool=layer.pool)

    def norm_alone(x: Tensor, *affine: Tensor) -> Tensor:
        x = function(norm_act(x, *affine, *running, training=True))
        return F.max_pool2d(x, 2) if layer.pool else x

    def run(compute: Callable[..., Tensor], memory_format: torch.memory_format) -> Callable[[], object]:
        leaves = [input.contiguous(memory_format=memory_format) if input.dim() == 4 else input.clone()]
        leaves[0].requires_grad_()
        if layer.norm:
            leaves += [torch.rand(channels, generator=generator).add(0.5).requires_grad_() for _ in range(2)]
        with torch.no_grad():
            upstream = torch.randn_like(compute(*leaves))
        return lambda: torch.autograd.grad(compute(*leaves), leaves, upstream)

    found = {
        "eager": run(torchs, torch.contiguous_format),
        "eager channels-last": run(torchs, torch.channels_last),
        "kernel": run(kernel, torch.channels_last),
    }
    return found | ({"norm alone": run(norm_alone, torch.channels_last)} if layer.norm else {})


def main() -> None:
    layers = {str(layer): partial(calls, layer) for layer in LAYERS}
    run("activations", str(__doc__).splitlines()[0], layers, 1.0)


if __name__ == "__main__":
    main()
