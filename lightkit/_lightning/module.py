"""Private attributes of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

# Keys in ``vars(module)``: the hook that the module logs under now, and its trainer. A write past ``__setattr__`` of
# `nn.Module` does not look whether the value is a parameter.
CURRENT_HOOK = "_current_fx_name"
TRAINER = "_trainer"


def is_compiled(module: nn.Module) -> bool:
    """Returns True for a LightningModule that Lightning took out of its wrapper by torch.compile."""
    return getattr(module, "_compiler_ctx", None) is not None


def batch_transfer_of(module: pl.LightningModule) -> Callable[..., Any]:
    """Returns the method that calls ``on_before_batch_transfer`` of a batch of one data loader."""
    return module._on_before_batch_transfer
