"""A callback that records in every process of a job the values with which that process trains."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Witness(Callback):
    """Adds a line to ``rankN.jsonl`` in the directory of the run for each training."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        entry = {
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seed": int(os.environ["PL_GLOBAL_SEED"]),
            "objective": float(trainer.callback_metrics["val/loss"]),
            "world_size": trainer.world_size,
        }
        with open(Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
