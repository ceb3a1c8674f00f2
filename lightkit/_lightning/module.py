"""Private attributes of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

# Keys in ``vars(module)``: the name of the hook that runs now, under which the module logs, and the module's trainer.
# ``__setattr__`` of `nn.Module` checks whether a value is a parameter; a write to ``vars(module)`` is faster.
CURRENT_HOOK = "_current_fx_name"
TRAINER = "_trainer"


def is_compiled(module: nn.Module) -> bool:
    """Returns True if a program passed ``module`` to Lightning in the wrapper of torch.compile, which it removes."""
    return getattr(module, "_compiler_ctx", None) is not None


def batch_transfer_of(module: pl.LightningModule) -> Callable[..., Any]:
    """Returns the method by which ``module`` calls its hook ``on_before_batch_transfer`` for a batch."""
    return module._on_before_batch_transfer
