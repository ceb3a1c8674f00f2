"""How fast is the native convolution, forward and backward, next to torch's on contiguous and on channels-last data?

    python benchmarks/conv2d.py [--threads 2] [--seconds 2] [--layers TEXT]

The layers are those of residual networks and of networks with batch norm on small images, the edges of
`conv2d_is_faster`, and one of large images. All gradients are computed, except that of images with up to three
channels, and freed memory is kept (`lightkit.memory.keep_freed_memory`). "kernel" is the native op, also with the
statistics of its output. ``share_of_matmul`` is the rate of multiply-adds, counted as direct products, over that of a
large matrix product in the same process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median

from lightkit import native
from lightkit.flops import matmul_rate
from lightkit.memory import keep_freed_memory
from lightkit.ops import conv2d, conv2d_is_faster


@dataclass(frozen=True)
class Layer:
    """A convolution of square images with a square kernel."""

    channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    batch: int = 64
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = f"{self.channels} -> {self.out_channels}, {self.size}x{self.size}, {self.kernel}x{self.kernel}"
        extras = [
            *([f"stride {self.stride}"] if self.stride > 1 else []),
            *([] if self.padding == self.dilation * (self.kernel // 2) else [f"padding {self.padding}"]),
            *([f"dilation {self.dilation}"] if self.dilation > 1 else []),
            *([f"{self.groups} groups"] if self.groups > 1 else []),
        ]
        return ", ".join([shape, *extras])

    @property
    def settings(self) -> tuple[int, int, int, int]:
        return self.stride, self.padding, self.dilation, self.groups


LAYERS = [
    Layer(3, 16, 32),
    Layer(3, 32, 32),
    Layer(1, 32, 28, padding=0),
    Layer(16, 16, 32),
    Layer(16, 32, 32, stride=2),
    Layer(16, 32, 32, 1, 2, 0),
    Layer(32, 32, 16),
    Layer(32, 64, 16, stride=2),
    Layer(32, 64, 16, 1, 2, 0),
    Layer(64, 64, 8),
    Layer(32, 64, 16),
    Layer(64, 128, 8),
    Layer(32, 64, 26, padding=0),
    Layer(64, 64, 56, batch=8),
    Layer(128, 128, 8),
    Layer(256, 256, 8, batch=32),
    Layer(512, 512, 4, batch=32),
    Layer(64, 256, 14, 1, padding=0, batch=32),
    Layer(256, 64, 14, 1, padding=0, batch=32),
    Layer(3, 64, 112, 7, 2, 3, batch=8),
    Layer(6, 16, 14, 5, padding=0),
    Layer(20, 20, 16),
    Layer(64, 64, 16, padding=2, dilation=2),
    Layer(64, 64, 16, groups=2),
    Layer(64, 64, 16, groups=8),
    Layer(64, 64, 16, groups=64),
    Layer(16, 16, 32, dtype=torch.float64),
    Layer(64, 64, 8, dtype=torch.float64),
]


def calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """Returns forward and backward of a layer, by each way."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=layer.dtype)  # noqa: E731
    images = draw(layer.batch, layer.channels, layer.size, layer.size)
    fan_in = layer.channels // layer.groups * layer.kernel**2
    weights = draw(layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel) * fan_in**-0.5

    def both(function: Callable[..., torch.Tensor], format: torch.memory_format, of_output: torch.memory_format):
        x = images.contiguous(memory_format=format).requires_grad_(layer.channels > 3)
        w = weights.contiguous(memory_format=format).requires_grad_()
        upstream = torch.randn_like(function(x, w, None, *layer.settings)).contiguous(memory_format=of_output)
        leaves = [leaf for leaf in (x, w) if leaf.requires_grad]
        return lambda: torch.autograd.grad(function(x, w, None, *layer.settings), leaves, upstream)

    plain, last = torch.contiguous_format, torch.channels_last
    return {
        "eager": both(F.conv2d, plain, plain),
        "eager channels-last": both(F.conv2d, last, last),
        "kernel": both(conv2d, last, last),
        "kernel, statistics": both(lambda *a: conv2d(*a, statistics=True)[0], last, last),
    }


def macs(layer: Layer) -> int:
    """Returns the multiply-adds of forward and backward."""
    reach = layer.dilation * (layer.kernel - 1) + 1
    size = (layer.size + 2 * layer.padding - reach) // layer.stride + 1
    once = layer.batch * size**2 * layer.out_channels * layer.channels // layer.groups * layer.kernel**2
    return once * (3 if layer.channels > 3 else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer")
    parser.add_argument("--layers", default="", help="measure the layers whose names contain this text")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    native.load()
    # Otherwise the system clears the pages of every result, which takes longer than some of the kernels.
    keep_freed_memory()
    rates = {dtype: matmul_rate(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float64)}
    rows = []
    for layer in (layer for layer in LAYERS if options.layers in str(layer)):
        measured = interleaved(calls(layer), options.seconds)
        times = {what: median(t) for what, t in measured.items()}
        torchs = min(times["eager"], times["eager channels-last"])
        for what, seconds in times.items():
            rows.append(
                {
                    "job": str(layer),
                    "dtype": str(layer.dtype).removeprefix("torch."),
                    "batch": layer.batch,
                    "what": what,
                    "milliseconds": round(seconds * 1e3, 3),
                    "times_eager": round(times["eager"] / seconds, 2),
                    "times_faster_eager": round(torchs / seconds, 2),
                    "share_of_matmul": round(2 * macs(layer) / seconds / rates[layer.dtype], 2),
                    "n": len(measured[what]),
                }
            )
        shape = (layer.batch, layer.channels, layer.size, layer.size)
        weight = (layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel)
        faster = conv2d_is_faster(shape, weight, *layer.settings, layer.dtype)
        shown = ", ".join(f"{what} {seconds * 1e3:.2f}" for what, seconds in times.items())
        print(f"{layer}, {layer.dtype}: {shown} ms; {torchs / times['kernel']:.2f}, {faster}", flush=True)
    print(f"appended to {append('conv2d', rows)}")


if __name__ == "__main__":
    main()
