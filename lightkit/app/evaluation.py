"""The test metrics of a checkpoint: what `lightkit.evaluate` prints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from lightkit._util.printable import printable
from lightkit.app.factory import refusals_of_lightning
from lightkit.app.restore import Restored, refusals_of_a_model, restore
from lightkit.config import build
from lightkit.data import MNIST, Text
from lightkit.errors import CheckpointError, ConfigError
from lightkit.strategies import tpu

# Arguments of data modules that say where the data are.
_PLACES = ("data_dir", "path")

# Of Lightning's, those that need no package of their own.
_PRECISIONS = ("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "16", "bf16", "32", "64")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Computes the test metrics of a checkpoint, as lightkit.train computes them.

    Args:
        config: the keys of ``conf/evaluate.yaml``.

    Raises:
        LightkitError: the checkpoint, its data or a key of the configuration cannot be used.
    """
    restored = restore(config.ckpt_path, evaluates=True)
    data = _build_data(config, restored)
    trainer = build(
        {"_target_": "lightning.pytorch.Trainer"},
        **(tpu.choose() if config.accelerator == "tpu" else {"accelerator": config.accelerator}),
        devices=1,
        precision=_precision(restored),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with refusals_of_a_model(), refusals_of_lightning():
        (metrics,) = trainer.test(restored.task, datamodule=data, verbose=False)
    return metrics


def _build_data(config: DictConfig, restored: Restored) -> pl.LightningDataModule:
    """Builds the data module; what the checkpoint says of a place is shown before anything there is read."""
    data = restored.build_data()
    place = next((name for name in _PLACES if hasattr(data, name)), None)
    if config.data_dir is not None:
        if place is None:
            raise ConfigError(f"data_dir: {type(data).__name__} does not read from a directory")
        setattr(data, place, config.data_dir)
    elif place is not None and getattr(data, place) is not None:
        print(f"reading {printable(str(getattr(data, place)))}, which the checkpoint names", flush=True)
    if isinstance(data, Text):
        data.is_own = config.data_dir is not None
    if isinstance(data, MNIST):
        data.download = config.download
    return data


def _precision(restored: Restored) -> str | int:
    trainer = restored.config.get("trainer")
    precision = trainer.get("precision", "32-true") if isinstance(trainer, dict) else "32-true"
    if str(precision) not in _PRECISIONS:
        raise CheckpointError(
            f"trainer.precision of the checkpoint is {printable(str(precision))!r}, expected {', '.join(_PRECISIONS)}"
        )
    return precision
