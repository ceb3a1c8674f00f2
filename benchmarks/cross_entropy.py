"""How fast is cross-entropy, forward alone and with backward, next to what a user would take instead?

    python benchmarks/cross_entropy.py [--compiled] [--seconds 4]

Peers: torch eager; with --compiled, torch.compile of the same; and on a GPU, where it is installed, Liger's. Ours with
a gradient in memory of its own, and in place. All read the same logits. "bare" is the backward of a loss that computes
nothing: what autograd takes in all of them, most of the time where the logits are few. The floor is a copy of the
logits: two streams, what must be read once and written once; of the forward alone, a sum over them, which reads them
once. Peak memory is what the first call takes beyond what there was before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median, peak_memory

from lightkit.ops import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(128, 10), (4096, 10), (60000, 10), (4096, 1000), (1024, 32000), (512, 128256)]
if DEVICE == "cuda":
    SIZES = [(128, 10), (60000, 10), (32768, 256), (32768, 1024), (32768, 4096)]
    SIZES += [(16384, 16384), (8192, 32000), (4096, 65536), (4096, 128256), (2048, 262144)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Job:
    """Forward and backward of one loss on one size, without what produces the logits."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.logits = torch.randn(rows, classes, generator=generator, device=DEVICE).to(dtype)
        self.target = torch.randint(0, classes, (rows,), generator=generator, device=DEVICE)
        self.scratch = torch.zeros_like(self.logits)
        self.produced = self.logits.clone()
        self.loss = torch.zeros((), dtype=dtype, device=DEVICE)

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


def passes(job: Job, compiled: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed against each other, for each of the two passes."""
    both = {
        "eager": lambda: job.leaf(F.cross_entropy),
        "lightkit": lambda: job.leaf(cross_entropy),
        "lightkit in place": job.in_place,
        "bare": job.bare,
        "floor": job.copy,
    }
    alone = {
        "eager": torch.no_grad()(lambda: F.cross_entropy(job.logits, job.target)),
        "lightkit": torch.no_grad()(lambda: cross_entropy(job.logits, job.target)),
        "floor": lambda: job.logits.sum(),
    }
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(lambda z, t: F.cross_entropy(z, t), dynamic=False)
        both["compiled"] = lambda: job.leaf(function)
        alone["compiled"] = torch.no_grad()(lambda: function(job.logits, job.target))
        for functions in (both, alone):
            # What compiling takes is not what calling takes.
            functions["compiled"]()
    if (liger := _liger()) is not None:
        # It writes its gradient into the logits: into some of its own.
        own = Job(job.logits.shape[0], job.logits.shape[1], job.logits.dtype)
        both["Liger"] = lambda: own.leaf(liger)
    return {"forward and backward": both, "forward": alone}


def _liger() -> Callable | None:
    """Liger's loss, whose kernels are Triton's, and so a GPU's."""
    if DEVICE != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile, which takes minutes to build")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size, dtype and pass")
    options = parser.parse_args()
    rows = []
    for (count, classes), (name, dtype) in ((s, d) for s in SIZES for d in DTYPES.items()):
        for which, functions in passes(Job(count, classes, dtype), options.compiled).items():
            memory = {what: peak_memory(function) for what, function in functions.items()}
            measured = interleaved(functions, options.seconds)
            times = {what: median(t) for what, t in measured.items()}
            for what, seconds in times.items():
                rows.append(
                    {
                        "rows": count,
                        "classes": classes,
                        "dtype": name,
                        "pass": which,
                        "what": what,
                        "milliseconds": round(seconds * 1e3, 4),
                        "times_eager": round(times["eager"] / seconds, 2),
                        "fraction_of_floor": round(times["floor"] / seconds, 3),
                        "peak_mib": "" if memory[what] is None else round(memory[what], 1),
                        "n": len(measured[what]),
                    }
                )
            shown = ", ".join(f"{w} {t * 1e3:.3f} ms" for w, t in times.items())
            print(f"{count} x {classes} {name}, {which}: {shown}", flush=True)
    print(f"appended to {append('cross_entropy', rows)}")


if __name__ == "__main__":
    main()
