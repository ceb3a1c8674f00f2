"""Data parallel wrappers around a module whose parameters have changed."""

from __future__ import annotations

import gc

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


def wrap_anew(trainer: pl.Trainer) -> None:
    """Wraps the module in ``DistributedDataParallel`` anew: a wrapper finds the trained parameters when it is made.

    The function does nothing for a strategy without such a wrapper. All processes must call it.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.model.module
        # The hooks of the old wrapper at the parameters must go before the new ones come.
        gc.collect()
        strategy.configure_ddp()
