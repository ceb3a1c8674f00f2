"""How fast is dropout, whose mask is computed from a seed, next to torch's?

    python benchmarks/dropout.py [--threads 2] [--seconds 3]

The shapes are those of a classifier's head and of a small transformer's layers. Each is measured forward and backward
together, in training, with p = 0.5. Peer: torch eager, whose draws are serial and whose mask is stored. "copy" copies
the input twice, which is the memory that forward and backward read and write at least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median

from lightkit import native
from lightkit.memory import keep_freed_memory
from lightkit.ops import dropout

SHAPES = [(64, 9216), (64, 128), (32 * 64, 128), (32 * 64, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of one shape."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(dtype)
    copied = torch.empty_like(upstream)
    return {
        "eager": lambda: torch.autograd.grad(F.dropout(input, 0.5), input, upstream),
        "lightkit": lambda: torch.autograd.grad(dropout(input, 0.5), input, upstream),
        "copy": lambda: copied.copy_(upstream).copy_(upstream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and dtype")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    native.load()
    keep_freed_memory()
    rows = []
    for dtype in DTYPES:
        for shape in SHAPES:
            measured = interleaved(calls(shape, dtype), options.seconds)
            times = {what: median(t) for what, t in measured.items()}
            for what, seconds in times.items():
                rows.append(
                    {
                        "shape": "x".join(map(str, shape)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "what": what,
                        "microseconds": round(seconds * 1e6, 1),
                        "least_microseconds": round(min(measured[what]) * 1e6, 1),
                        "times_eager": round(times["eager"] / seconds, 2),
                        "n": len(measured[what]),
                    }
                )
            shown = ", ".join(f"{w} {t * 1e6:.0f}" for w, t in times.items())
            print(f"{shape}, {dtype}: {shown} us", flush=True)
    print(f"appended to {append('dropout', rows)}")


if __name__ == "__main__":
    main()
