"""How fast is cross-entropy, forward and backward, next to what a user would take instead?

    python benchmarks/cross_entropy.py [--compiled] [--seconds 4]

Peers: torch eager and, with --compiled, torch.compile of the same. Ours with a gradient in memory of its own,
and in place. All read the same logits. "bare" is the backward of a loss that computes nothing: what autograd takes
in all of them, most of the time where the logits are few. The floor is a copy of the logits: two streams, what must
be read once and written once.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median

from lightkit.ops import cross_entropy

SIZES = [(128, 10), (4096, 10), (60000, 10), (4096, 1000), (1024, 32000), (512, 128256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Job:
    """Forward and backward of one loss on one size, without what produces the logits."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(rows, classes, generator=generator).to(dtype)
        self.target = torch.randint(0, classes, (rows,), generator=generator)
        self.scratch = torch.zeros_like(self.logits)
        self.produced = self.logits.clone()
        self.loss = torch.zeros((), dtype=dtype)

    def leaf(self, function) -> None:
        """The gradient arrives at a leaf and is dropped, as a model's backward would drop it."""
        logits = self.logits.detach().requires_grad_()
        torch.autograd.grad(function(logits, self.target), logits)

    def in_place(self) -> None:
        """The logits are overwritten: refilling them afterwards is not what is asked, so they are not."""
        base = self.logits.detach().requires_grad_()
        torch.autograd.grad(cross_entropy(_Produced.apply(base, self), self.target, inplace=True), base)
        # A result without history again, for the next call.
        self.produced.detach_()

    def bare(self) -> None:
        """No loss at all."""
        logits = self.logits.detach().requires_grad_()
        torch.autograd.grad(_Nothing.apply(logits, self.loss, self.scratch), logits)

    def copy(self) -> None:
        """The floor."""
        self.scratch.copy_(self.logits)


class _Produced(torch.autograd.Function):
    """Gives out a job's tensor as its result, at no cost: what an in-place loss gets from the layer before it."""

    @staticmethod
    def forward(ctx, base, job):
        return job.produced

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Nothing(torch.autograd.Function):
    """A loss and a gradient that are there already."""

    @staticmethod
    def forward(ctx, logits, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient, None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile, which takes minutes to build")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size and dtype")
    options = parser.parse_args()
    rows = []
    for (count, classes), (name, dtype) in ((s, d) for s in SIZES for d in DTYPES.items()):
        job = Job(count, classes, dtype)
        functions = {
            "eager": lambda job=job: job.leaf(F.cross_entropy),
            "lightkit": lambda job=job: job.leaf(cross_entropy),
            "lightkit in place": job.in_place,
            "bare": job.bare,
            "copy": job.copy,
        }
        if options.compiled:
            torch._dynamo.reset()
            compiled = torch.compile(lambda z, t: F.cross_entropy(z, t), dynamic=False)
            functions["compiled"] = lambda job=job, compiled=compiled: job.leaf(compiled)
        measured = interleaved(functions, options.seconds)
        times = {what: median(t) for what, t in measured.items()}
        for what, seconds in times.items():
            rows.append(
                {
                    "rows": count,
                    "classes": classes,
                    "dtype": name,
                    "what": what,
                    "milliseconds": round(seconds * 1e3, 4),
                    "times_eager": round(times["eager"] / seconds, 2),
                    "fraction_of_copy": round(times["copy"] / seconds, 3),
                    "n": len(measured[what]),
                }
            )
        print(
            f"{count} x {classes} {name}: " + ", ".join(f"{w} {t * 1e3:.3f} ms" for w, t in times.items()), flush=True
        )
    print(f"appended to {append('cross_entropy', rows)}")


if __name__ == "__main__":
    main()
