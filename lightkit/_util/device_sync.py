"""Synchronization with devices, which compute asynchronously."""

from __future__ import annotations

import torch


def wait_for(device: torch.device) -> None:
    """Waits until ``device`` has finished all operations queued on it; returns at once for the CPU."""
    if device.type == "xla":
        import torch_xla  # pyright: ignore[reportMissingImports] (installed on machines with a TPU alone)

        # torch_xla records operations lazily: sync runs the recorded ones, then waits.
        torch_xla.sync(wait=True)
    elif device.type != "cpu" and (current := torch.accelerator.current_accelerator()) is not None:
        if device.type == current.type:
            torch.accelerator.synchronize(device)
