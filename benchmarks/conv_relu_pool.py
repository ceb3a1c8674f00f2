"""How fast are the fused blocks, alone and in a training step of the CNN, next to torch's layers?

    python benchmarks/conv_relu_pool.py [--threads 2] [--seconds 5]

The layers, forward and backward, with the gradients that a network needs (none of the images), are the three of the
CNN and some of larger networks, with padding; peers: torch eager on contiguous and on channels-last data. "kernel" is
the native one, "lightkit" what `conv_relu_pool` makes of it, which leaves some layers to torch. "linear A-B-C" are
linear layers with a ReLU between them, alone: torch's, and as a chain. The step is forward, cross-entropy, backward and
Adam, on the CNN with ``blocks="fused"`` and ``blocks="torch"``, and, for the latter, with torch's loss and as torch's
default memory format and channels-last have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median
from torch import Tensor

from lightkit import native
from lightkit.models import CNN
from lightkit.ops import ChainLayer, conv_relu_pool, conv_relu_pool_reference, cross_entropy, layer_chain

BATCHES = [32, 128]
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with ReLU, and perhaps a pool."""

    channels: int
    out_channels: int
    size: int
    padding: int
    pool: bool

    def __str__(self) -> str:
        shape = f"{self.channels} -> {self.out_channels}, {self.size}x{self.size}"
        return shape + (", padded" if self.padding else "") + (", pool" if self.pool else "")


LAYERS = [
    Layer(1, 32, 28, 0, True),
    Layer(32, 64, 13, 0, True),
    Layer(64, 64, 5, 0, False),
    Layer(3, 32, 32, 1, True),
    Layer(64, 64, 32, 1, False),
    Layer(64, 128, 16, 1, True),
    Layer(128, 128, 8, 1, False),
    Layer(256, 256, 8, 1, True),
]


def calls(layer: Layer, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of one block, on data as the network has it: positive behind the first layer."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, layer.channels, layer.size, layer.size, generator=generator)
    images = (images if layer.channels <= 3 else images.relu()).to(dtype)
    convolution = torch.nn.Conv2d(layer.channels, layer.out_channels, 3).to(dtype)

    def run(function, memory_format: torch.memory_format) -> Callable[[], object]:
        x = images.contiguous(memory_format=memory_format).requires_grad_(layer.channels > 3)
        arguments = (x, convolution.weight, convolution.bias, layer.padding, layer.pool)
        leaves = [t for t in arguments[:3] if t.requires_grad]
        with torch.no_grad():
            upstream = torch.randn_like(function(*arguments))
        return lambda: torch.autograd.grad(function(*arguments), leaves, upstream)

    def kernel(input, weight, bias, padding, pool) -> Tensor:
        return torch.ops.lightkit.conv_relu_pool(input, weight, bias, (padding, padding), pool)

    return {
        "eager": run(conv_relu_pool_reference, torch.contiguous_format),
        "eager channels-last": run(conv_relu_pool_reference, torch.channels_last),
        "kernel": run(kernel, torch.channels_last),
        "lightkit": run(conv_relu_pool, torch.channels_last),
    }


# Features of linear layers.
HEADS = [(576, 64, 10), (784, 128, 10), (256, 256, 256), (512, 256, 10), (1024, 512, 10)]


def head(features: tuple[int, ...], batch: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of linear layers, on values as they come out of a ReLU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, features[0], generator=generator).relu().requires_grad_()
    linear = [torch.nn.Linear(*sizes) for sizes in pairwise(features)]
    leaves = [x, *(parameter for layer in linear for parameter in layer.parameters())]
    upstream = torch.randn(batch, features[-1], generator=generator)

    def torchs() -> object:
        y = x
        for layer in linear[:-1]:
            y = F.relu(layer(y))
        return torch.autograd.grad(linear[-1](y), leaves, upstream)

    def chain() -> object:
        layers = [ChainLayer(layer.weight, layer.bias, relu=layer is not linear[-1]) for layer in linear]
        return torch.autograd.grad(layer_chain(x, layers), leaves, upstream)

    return {"eager": torchs, "kernel": chain}


def step(batch: int) -> dict[str, Callable[[], object]]:
    """A training step of the CNN."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)

    def run(blocks: str, loss: Callable[[Tensor, Tensor], Tensor], memory_format, **adam) -> Callable[[], object]:
        torch.manual_seed(0)
        model = CNN(blocks=blocks).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters(), **adam)

        def train() -> None:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()

        return train

    plain, last = torch.contiguous_format, torch.channels_last
    return {
        "eager": run("torch", F.cross_entropy, plain),
        "eager channels-last": run("torch", F.cross_entropy, last),
        "eager fused Adam": run("torch", cross_entropy, plain, fused=True),
        "lightkit": run("fused", cross_entropy, plain),
        "lightkit fused Adam": run("fused", cross_entropy, plain, fused=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each layer or step and batch")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    native.load()
    rows = []
    for batch in BATCHES:
        jobs = [(str(layer), d, calls(layer, batch, d)) for d in DTYPES for layer in LAYERS]
        jobs += [("linear " + "-".join(map(str, f)), torch.float32, head(f, batch)) for f in HEADS]
        for name, dtype, functions in [*jobs, ("training step", torch.float32, step(batch))]:
            measured = interleaved(functions, options.seconds)
            times = {what: median(t) for what, t in measured.items()}
            for what, seconds in times.items():
                rows.append(
                    {
                        "job": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "batch": batch,
                        "what": what,
                        "microseconds_per_image": round(seconds * 1e6 / batch, 2),
                        "times_eager": round(times["eager"] / seconds, 2),
                        "n": len(measured[what]),
                    }
                )
            shown = ", ".join(f"{w} {t * 1e6 / batch:.1f}" for w, t in times.items())
            print(f"batch {batch}, {name}, {dtype}: {shown} us/image", flush=True)
    print(f"appended to {append('conv_relu_pool', rows)}")


if __name__ == "__main__":
    main()
