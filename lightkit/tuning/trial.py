"""A short training that writes nothing, logs nothing and validates nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def run_trial(
    module: pl.LightningModule, data: pl.LightningDataModule, steps: int, *callbacks: Callback, **options: Any
) -> pl.Trainer:
    """Trains a module for some steps, in as many epochs as these take.

    Args:
        module: the module.
        data: the data module.
        steps: the number of optimizer steps.
        *callbacks: the callbacks of the training.
        **options: further arguments of Lightning's Trainer, such as ``accelerator``.

    Returns:
        The trainer.
    """
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        **{
            **options,
            **nothing,
            "callbacks": list(callbacks),
            "devices": 1,
            "max_epochs": -1,
            "max_steps": steps,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }
    )
    trainer.fit(module, datamodule=data)
    return trainer
