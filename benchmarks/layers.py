"""Times ways to compute layers against each other and appends a row for each: the program of several benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rows import append
from timing import interleaved, median

from lightkit import native
from lightkit.memory import keep_freed_memory


def run(
    name: str,
    description: str,
    layers: Mapping[str, Callable[[], dict[str, Callable[[], object]]]],
    seconds: float,
    column: str = "layer",
    eager_of: Callable[[str], str] = lambda what: "eager",
) -> None:
    """Measures each layer, prints a line of it, and appends the rows.

    Args:
        name: the file in results/, without ``.csv``.
        description: the first line of the help.
        layers: a function for each layer, which returns the ways to compute it.
        seconds: the default time for a layer.
        column: the name of the column with the layer's name.
        eager_of: returns the way of torch with which a way is compared.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each {column}")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    native.load()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for layer, calls in layers.items():
        measured = interleaved(calls(), options.seconds)
        times = {what: median(t) for what, t in measured.items()}
        for what, taken in times.items():
            rows.append(
                {
                    column: layer,
                    "dtype": "float32",
                    "what": what,
                    "microseconds": round(taken * 1e6, 1),
                    "least_microseconds": round(min(measured[what]) * 1e6, 1),
                    "times_eager": round(times[eager_of(what)] / taken, 2),
                    "n": len(measured[what]),
                }
            )
        print(f"{layer}: " + ", ".join(f"{w} {t * 1e6:.0f}" for w, t in times.items()) + " us", flush=True)
    print(f"appended to {append(name, rows)}")
