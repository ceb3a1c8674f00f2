"""Times functions against each other, interleaved, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, list[float]]:
    """Returns the seconds of each call. The functions take turns, after two rounds to warm up.

    On a GPU a turn is as many calls as take two milliseconds, with one wait at the end: this is the time of a call in a
    training, where the host runs ahead of the device.

    Args:
        functions: the functions by name.
        seconds: the approximate time of the whole measurement.
        least: the smallest number of rounds.
    """
    for _ in range(2):
        for function in functions.values():
            function()
    synchronize()
    calls = {name: _calls(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, function in functions.items():
            times[name].append(_time(function, calls[name]))
    return times


def _time(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - started) / calls


def _calls(function: Callable[[], object]) -> int:
    return max(1, round(2e-3 / _time(function, 5))) if torch.cuda.is_available() else 1


def median(times: list[float]) -> float:
    """Returns the median."""
    return statistics.median(times)


def peak_memory(function: Callable[[], object]) -> float | None:
    """Returns the MiB that a call needs at its peak beyond those in use before, or None if unknown.

    The memory is that of this process on a CPU (Linux), and that of the device on a GPU.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Writing 5 resets the peak of the process to its present memory.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    """Returns the KiB of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))
