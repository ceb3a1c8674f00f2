"""Waiting for devices, whose operations run on after Python has moved on."""

from __future__ import annotations

import torch


def wait_for(device: torch.device) -> None:
    """Returns when everything that was asked of a device has been done."""
    if device.type == "xla":
        import torch_xla

        # What has been recorded is run first.
        torch_xla.sync(wait=True)
    elif device.type != "cpu" and (current := torch.accelerator.current_accelerator()) is not None:
        if device.type == current.type:
            torch.accelerator.synchronize(device)
