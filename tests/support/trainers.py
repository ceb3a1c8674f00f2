"""Trainers that train, and neither write nor show anything."""

from __future__ import annotations

import lightning.pytorch as pl


def bare_trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    """Returns a Trainer of one epoch on the CPU, without logger, checkpoints, progress bar and summary.

    Args:
        callbacks: of the Trainer.
        options: arguments of `lightning.pytorch.Trainer`, in place of these or beside them.
    """
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [*callbacks, *options.pop("callbacks", ())]
    return pl.Trainer(callbacks=callbacks, **{"accelerator": "cpu", "max_epochs": 1, **nothing, **options})
