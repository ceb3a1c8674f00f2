"""The test metrics of a checkpoint: what `lightkit.evaluate` prints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from lightkit.errors import ConfigError
from lightkit.job import build_data, restore
from lightkit.strategies import tpu


def evaluate(config: DictConfig) -> dict[str, Any]:
    """The test metrics of a checkpoint, computed as lightkit.train computes them."""
    restored = restore(config.ckpt_path)
    if config.data_dir is not None:
        key = next((key for key in ("data_dir", "path") if key in restored.config.data), None)
        if key is None:
            raise ConfigError(f"data_dir: {restored.config.data._target_} does not read from a directory")
        restored.config.data[key] = config.data_dir
    trainer = pl.Trainer(
        **(tpu.choose() if config.accelerator == "tpu" else {"accelerator": config.accelerator}),
        devices=1,
        precision=restored.config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = trainer.test(restored.task, datamodule=build_data(restored.config), verbose=False)
    return metrics
