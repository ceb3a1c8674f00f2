"""How fast is the fused linear cross-entropy, forward and backward, and what memory does it take?

    python benchmarks/linear_cross_entropy.py [--seconds 20] [--sizes small,large]

Peers: F.linear and F.cross_entropy as they are and under torch.compile; torch's own linear_cross_entropy (2.13) with
its chunks; a loop over chunks of rows by hand; and, on a GPU, where they are installed, Liger's and Apple's
cut-cross-entropy. Ours with the default 64 MiB for logits and with room for all of them. "products" are the three
matrix products that no exact way can do without, on logits that are there already: the floor.

Times are of one process with `keep_freed_memory`, so that nobody pays for fresh pages. Memory is the peak of a first
call in a process of its own beyond what there was, the gradients included in it taken off. Errors are those of the
gradients against float64, the largest over the largest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median, peak_memory

from lightkit.memory import keep_freed_memory
from lightkit.ops import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"small": (2048, 512, 32000), "large": (1024, 1024, 128256)}
if DEVICE == "cuda":
    SIZES = {"small": (8192, 2048, 32000), "large": (8192, 4096, 128256)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Job:
    """Hidden states, a head and targets; the gradients of a call are dropped as an optimizer would drop them."""

    def __init__(self, rows: int, features: int, classes: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def randn(*sizes: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*sizes, generator=generator, device=DEVICE) * scale).to(dtype).requires_grad_()

        self.hidden = randn(rows, features)
        self.head = randn(classes, features, scale=features**-0.5)
        self.target = torch.randint(classes, (rows,), generator=generator, device=DEVICE)

    def gradients(self, function: Callable) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(self.hidden, self.head, self.target), (self.hidden, self.head))

    def by_hand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What one writes without a library: chunks of 64 MiB of float32 logits, gradients on the way."""
        hidden, head = self.hidden.detach(), self.head.detach()
        of_hidden, of_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        step = max(1, (64 << 20) // (4 * len(head)))
        for begin in range(0, len(hidden), step):
            rows, target = hidden[begin : begin + step], self.target[begin : begin + step, None]
            gradient = (rows @ head.t()).float().softmax(1)
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            gradient = (gradient / len(hidden)).to(hidden.dtype)
            torch.mm(gradient, head, out=of_hidden[begin : begin + step])
            if hidden.dtype == torch.float32:
                of_head.addmm_(gradient.t(), rows)
            else:
                of_head += gradient.t() @ rows
        return of_hidden, of_head.to(head.dtype)

    def products(self) -> None:
        hidden, head = self.hidden.detach(), self.head.detach()
        torch.mm(hidden, head.t(), out=self.logits)
        torch.mm(self.logits, head, out=self.of_hidden)
        torch.mm(self.logits.t(), hidden, out=self.of_head)

    def with_products(self) -> Job:
        """Memory for the floor."""
        self.logits = self.hidden.new_empty(len(self.hidden), len(self.head), requires_grad=False)
        self.of_hidden, self.of_head = torch.empty_like(self.hidden.detach()), torch.empty_like(self.head.detach())
        return self

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, head = self.hidden.detach().double(), self.head.detach().double()
        gradient = (hidden @ head.t()).softmax(1)
        gradient[torch.arange(len(hidden), device=DEVICE), self.target] -= 1
        gradient /= len(hidden)
        return gradient @ head, gradient.t() @ hidden


def eager(hidden, head, target):
    return F.cross_entropy(F.linear(hidden, head), target)


def contenders(job: Job) -> dict[str, Callable[[], object]]:
    """By name, what computes the gradients of a job."""
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    room = 8 * len(job.hidden) * len(job.head)
    found = {
        "eager": lambda: job.gradients(eager),
        "compiled": lambda: job.gradients(compiled),
        "loop by hand": job.by_hand,
        "lightkit": lambda: job.gradients(linear_cross_entropy),
        "lightkit, room for all": lambda: job.gradients(
            lambda h, w, t: linear_cross_entropy(h, w, t, memory_limit=room)
        ),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = lambda: job.gradients(partial(F.linear_cross_entropy, options=options))
    return found | _installed(job)


def _installed(job: Job) -> dict[str, Callable[[], object]]:
    """Peers whose kernels are Triton's, and so a GPU's."""
    found = {}
    if DEVICE != "cuda":
        return found
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        # Its backward takes half precision alone.
        if job.hidden.dtype != torch.float32:
            found["cut-cross-entropy"] = lambda: job.gradients(cut)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda: job.gradients(lambda h, w, t: liger(w, h, t))
    except ImportError:
        pass
    return found


def extra_memory(size: str, dtype: str, what: str) -> float | None:
    """MiB beyond inputs and gradients, asked of a process of its own."""
    command = [sys.executable, __file__, "--memory", size, dtype, what]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return None if said[-1] == "None" else float(said[-1])


def measure_memory(size: str, dtype: str, what: str) -> float | None:
    # Libraries, threads and code are there before anything is measured.
    small = Job(64, 64, 1000, DTYPES[dtype])
    contenders(small)[what]()
    job = Job(*SIZES[size], DTYPES[dtype])
    function = contenders(job)[what]
    if what == "compiled":
        # Compiling is not measured. What it leaves is given back to the system before the call that is.
        function()
    gradients = (job.hidden.nbytes + job.head.nbytes) / 2**20
    peak = peak_memory(function)
    return None if peak is None else peak - gradients


def errors(job: Job, exact: tuple[torch.Tensor, ...], function: Callable[[], object]) -> list[float]:
    return [
        float((mine.double() - true).abs().max() / true.abs().max())
        for mine, true in zip(function(), exact, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size and dtype")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--no-memory", action="store_true", help="leave out what takes a process for each contender")
    parser.add_argument("--memory", nargs=3, metavar=("SIZE", "DTYPE", "WHAT"), help="of one call alone")
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(*options.memory))
        return
    keep_freed_memory()
    rows = []
    for size, name in ((s, d) for s in options.sizes.split(",") for d in options.dtypes.split(",")):
        job = Job(*SIZES[size], DTYPES[name])
        functions = contenders(job)
        exact = job.exact()
        off = {what: errors(job, exact, function) for what, function in functions.items()}
        del exact
        functions["products"] = job.with_products().products
        measured = interleaved(functions, options.seconds)
        times = {what: median(t) for what, t in measured.items()}
        for what, seconds in times.items():
            memory = None if options.no_memory or what == "products" else extra_memory(size, name, what)
            rows.append(
                {
                    "size": "x".join(map(str, SIZES[size])),
                    "dtype": name,
                    "what": what,
                    "milliseconds": round(seconds * 1e3, 2),
                    "times_eager": round(times["eager"] / seconds, 2),
                    "times_compiled": round(times["compiled"] / seconds, 2),
                    "extra_mib": "" if memory is None else round(memory, 1),
                    "error_hidden": f"{off[what][0]:.2e}" if what in off else "",
                    "error_head": f"{off[what][1]:.2e}" if what in off else "",
                    "n": len(measured[what]),
                }
            )
            print(rows[-1], flush=True)
    print(f"appended to {append('linear_cross_entropy', rows)}")


if __name__ == "__main__":
    main()
