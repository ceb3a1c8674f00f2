"""How fast are batch normalization, residual, ReLU and pool as one operation, next to torch's operations?

    python benchmarks/norm_act.py [--threads 2] [--seconds 3]

The shapes are those of small residual networks at batch 64, and some without ReLU and pool; "mean" is the mean of each
image, as in the head of a network. Each is measured forward and backward together, in training, with all gradients.
Peers: torch eager on contiguous and on channels-last data, and "mean by torch", where the kernel computes all before
the mean. The statistics of "kernel, statistics" are given, as the convolution before it may compute them. "copy" copies
the input: the kernel reads the input twice and writes the output once forward, and reads input and gradient twice and
writes once backward. Freed memory is kept, as in a job of lightkit: fresh memory costs more than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from layers import run
from torch import Tensor

from lightkit.ops import norm_act, norm_act_reference


@dataclass(frozen=True)
class Layer:
    """A normalization and what follows it."""

    shape: tuple[int, ...]
    activation: str | None = "relu"
    pool: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        pool = {None: None, "max": "pool", "mean": "mean"}[self.pool]
        names = ["residual" if self.residual else None, self.activation, pool]
        return ", ".join(["x".join(map(str, self.shape)), *filter(None, names)])


LAYERS = [
    *(Layer((64, *size), residual=r) for size in ((16, 32, 32), (32, 16, 16), (64, 8, 8)) for r in (False, True)),
    *(Layer((64, *size), pool="max") for size in ((32, 32, 32), (64, 16, 16), (128, 8, 8))),
    *(
        Layer(shape, activation=None)
        for shape in ((64, 16, 32, 32), (64, 64, 8, 8), (4, 16, 8, 8), (64, 128), (2048, 512))
    ),
    *(Layer(shape) for shape in ((64, 20, 16, 16), (64, 128))),
    *(Layer((64, *size), pool="mean", residual=True) for size in ((64, 8, 8), (512, 4, 4), (512, 7, 7))),
    *(Layer((64, *size), pool="mean") for size in ((32, 16, 16), (128, 4, 4))),
    *(Layer((4, *size), pool="mean", residual=True) for size in ((64, 8, 8), (512, 7, 7))),
    Layer((64, 64, 8, 8), activation=None, pool="mean"),
    *(Layer((64, 320, 7, 7), activation=a, pool="mean") for a in ("hardtanh", "silu", "tanh")),
]


def calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """Forward and backward of one layer."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(layer.shape, generator=generator)
    channels = layer.shape[1]
    running = [torch.zeros(channels), torch.ones(channels)]
    options = {"training": True, "activation": layer.activation, "pool": layer.pool}
    dims = tuple(dim for dim in range(len(layer.shape)) if dim != 1)
    variance, mean = torch.var_mean(input, dims, unbiased=False)

    def laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
        return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor

    def run(function, memory_format: torch.memory_format, **more) -> Callable[[], object]:
        leaves = [laid_out(input, memory_format).requires_grad_()]
        leaves += [torch.rand(channels, generator=generator).add(0.5).requires_grad_() for _ in range(2)]
        if layer.residual:
            leaves.append(laid_out(torch.randn(layer.shape, generator=generator), memory_format).requires_grad_())
        arguments = (*leaves[:3], *running, *leaves[3:])
        with torch.no_grad():
            upstream = torch.randn_like(function(*arguments, **options, **more))
        return lambda: torch.autograd.grad(function(*arguments, **options, **more), leaves, upstream)

    def mean_by_torch(*arguments, **given) -> Tensor:
        return norm_act(*arguments, **{**given, "pool": None}).mean((2, 3), keepdim=True)

    last, copied = torch.channels_last, torch.empty_like(input)
    found = {
        "eager": run(norm_act_reference, torch.contiguous_format),
        "eager channels-last": run(norm_act_reference, last),
        "kernel": run(norm_act, last),
        "kernel, statistics": run(norm_act, last, statistics=torch.stack([mean, variance])),
        "copy": lambda: copied.copy_(input),
    }
    return found | ({"mean by torch": run(mean_by_torch, last)} if layer.pool == "mean" else {})


def main() -> None:
    layers = {str(layer): partial(calls, layer) for layer in LAYERS}
    run("norm_act", str(__doc__).splitlines()[0], layers, 3.0)


if __name__ == "__main__":
    main()
