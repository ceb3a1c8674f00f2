"""The test metrics of a checkpoint: what `lightkit.evaluate` prints."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lightkit.config import build
from lightkit.errors import ConfigError
from lightkit.job import build_data, refusals_of_lightning, restore
from lightkit.strategies import tpu


def evaluate(config: DictConfig) -> dict[str, Any]:
    """The test metrics of a checkpoint, computed as lightkit.train computes them."""
    restored = restore(config.ckpt_path)
    if config.data_dir is not None:
        key = next((key for key in ("data_dir", "path") if key in restored.config.data), None)
        if key is None:
            raise ConfigError(f"data_dir: {restored.config.data._target_} does not read from a directory")
        restored.config.data[key] = config.data_dir
    trainer = build(
        {"_target_": "lightning.pytorch.Trainer"},
        **(tpu.choose() if config.accelerator == "tpu" else {"accelerator": config.accelerator}),
        devices=1,
        precision=restored.config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = build_data(restored.config)
    with refusals_of_lightning():
        (metrics,) = trainer.test(restored.task, datamodule=data, verbose=False)
    return metrics
