"""Timing of functions against each other: interleaved, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Waits for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns after two warm-up rounds.

    Args:
        functions: by name.
        seconds: about how long all of it may take.
        least: rounds at any rate.
    """
    for _ in range(2):
        for function in functions.values():
            function()
    synchronize()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            synchronize()
            times[name].append(time.perf_counter() - started)
    return times


def median(times: list[float]) -> float:
    """The middle value."""
    return statistics.median(times)
