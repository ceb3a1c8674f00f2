"""How fast are the fused blocks, alone and in a training step of the CNN, next to torch's layers?

    python benchmarks/conv_relu_pool.py [--threads 2] [--seconds 5]

The layers are the three of the CNN, forward and backward, with the gradients that the network needs (none of the
images); peers: torch eager on contiguous and on channels-last data. The step is forward, cross-entropy, backward and
Adam, on the CNN with ``blocks="fused"`` and ``blocks="torch"``, and, for the latter, with torch's loss and as
torch's default memory format and channels-last have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median
from torch import Tensor

from lightkit.models import CNN
from lightkit.ops import conv_relu_pool, conv_relu_pool_reference, cross_entropy

# Channels in and out, height and width, whether a pool follows.
LAYERS = [(1, 32, 28, True), (32, 64, 13, True), (64, 64, 5, False)]
BATCHES = [32, 128]


def layer(batch: int, channels: int, out_channels: int, size: int, pool: bool) -> dict[str, Callable[[], object]]:
    """Forward and backward of one block, on data as the network has it: positive behind the first layer."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, size, size, generator=generator)
    images = images if channels == 1 else images.relu()
    convolution = torch.nn.Conv2d(channels, out_channels, 3)

    def run(function, memory_format: torch.memory_format) -> Callable[[], object]:
        x = images.contiguous(memory_format=memory_format).requires_grad_(channels > 1)
        leaves = [t for t in (x, convolution.weight, convolution.bias) if t.requires_grad]
        with torch.no_grad():
            upstream = torch.randn_like(function(x, convolution.weight, convolution.bias, 0, pool))
        return lambda: torch.autograd.grad(function(x, convolution.weight, convolution.bias, 0, pool), leaves, upstream)

    return {
        "eager": run(conv_relu_pool_reference, torch.contiguous_format),
        "eager channels-last": run(conv_relu_pool_reference, torch.channels_last),
        "lightkit": run(conv_relu_pool, torch.channels_last),
    }


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
    rows = []
    for batch in BATCHES:
        jobs = {f"{c} -> {o}, {s}x{s}{', pool' if p else ''}": layer(batch, c, o, s, p) for c, o, s, p in LAYERS}
        for name, functions in {**jobs, "training step": step(batch)}.items():
            measured = interleaved(functions, options.seconds)
            times = {what: median(t) for what, t in measured.items()}
            for what, seconds in times.items():
                rows.append(
                    {
                        "job": name,
                        "batch": batch,
                        "what": what,
                        "microseconds_per_image": round(seconds * 1e6 / batch, 2),
                        "times_eager": round(times["eager"] / seconds, 2),
                        "n": len(measured[what]),
                    }
                )
            shown = ", ".join(f"{w} {t * 1e6 / batch:.1f}" for w, t in times.items())
            print(f"batch {batch}, {name}: {shown} us/image", flush=True)
    print(f"appended to {append('conv_relu_pool', rows)}")


if __name__ == "__main__":
    main()
