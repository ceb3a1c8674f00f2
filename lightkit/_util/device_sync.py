"""Waits for devices, which compute while Python goes on."""

from __future__ import annotations

import torch


def wait_for(device: torch.device) -> None:
    """Waits until a device has done all that it was asked to do."""
    if device.type == "xla":
        import torch_xla  # pyright: ignore[reportMissingImports] (installed on machines with a TPU alone)

        # Runs the recorded operations first.
        torch_xla.sync(wait=True)
    elif device.type != "cpu" and (current := torch.accelerator.current_accelerator()) is not None:
        if device.type == current.type:
            torch.accelerator.synchronize(device)
