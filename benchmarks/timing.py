"""Timing of functions against each other: interleaved, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize() -> None:
    """Waits for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns after two warm-up rounds.

    On a GPU a turn is as many calls as take two milliseconds, one after the other, waited for together: what a call
    takes in a training, where the host runs ahead of the device.

    Args:
        functions: by name.
        seconds: about how long all of it may take.
        least: rounds at any rate.
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
    """The middle value."""
    return statistics.median(times)


def peak_memory(function: Callable[[], object]) -> float | None:
    """MiB that the first call of a function has in use at its peak beyond what there was, or None if unknown.

    Of this process on a CPU (Linux), of the device on a GPU.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Sets the process's peak to what it has in use now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    """KiB in a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))
