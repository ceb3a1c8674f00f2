"""Evaluation of a checkpoint on its test set, for `lightkit.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightkit._util.printable import printable
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.restore import RestoredTask, model_errors_as_checkpoint_errors, restore
from lightkit.config import build
from lightkit.data import MNIST, Text
from lightkit.errors import CheckpointError, ConfigError
from lightkit.strategies import tpu

# Arguments of data modules that say where the data lie.
_LOCATION_ARGUMENTS = ("data_dir", "path")

# Lightning's precisions that need no further package.
_PRECISIONS = ("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "16", "bf16", "32", "64")


def evaluate(
    ckpt_path: str | Path, *, data_dir: str | None = None, download: bool = True, accelerator: str = "auto"
) -> dict[str, Any]:
    """Computes the test metrics of a checkpoint, as lightkit.train computes them.

    Args:
        ckpt_path: a checkpoint of lightkit.train; it may come from an untrusted source.
        data_dir: the file or directory of the data; None takes the path in the checkpoint.
        download: let the data module download a missing data set.
        accelerator: the argument ``accelerator`` of Lightning's Trainer, or ``"tpu"``.

    Returns:
        The metrics by name, such as ``test/loss``.

    Raises:
        LightkitError: the checkpoint, its data or an argument cannot be used.
    """
    restored = restore(ckpt_path, for_evaluation=True)
    data = _build_data(restored, data_dir, download)
    trainer = build(
        {"_target_": "lightning.pytorch.Trainer"},
        **(tpu.choose() if accelerator == "tpu" else {"accelerator": accelerator}),
        devices=1,
        precision=_precision(restored),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with model_errors_as_checkpoint_errors(), lightning_errors_as_config_errors():
        (metrics,) = trainer.test(restored.task, datamodule=data, verbose=False)
    return metrics


def _build_data(restored: RestoredTask, data_dir: str | None, download: bool) -> pl.LightningDataModule:
    """Builds the data module of a checkpoint.

    Args:
        restored: the task of the checkpoint.
        data_dir: the file or directory of the data; None takes the path in the checkpoint, which the function prints
            before the data module reads from it.
        download: let the data module download a missing data set.
    """
    data = restored.build_data()
    place = next((name for name in _LOCATION_ARGUMENTS if hasattr(data, name)), None)
    if data_dir is not None:
        if place is None:
            raise ConfigError(f"data_dir: {type(data).__name__} does not read from a directory")
        setattr(data, place, data_dir)
    elif place is not None and getattr(data, place) is not None:
        print(f"reading {printable(str(getattr(data, place)))}, which the checkpoint names", flush=True)
    if isinstance(data, Text):
        data.is_own = data_dir is not None
    if isinstance(data, MNIST):
        data.download = download
    return data


def _precision(restored: RestoredTask) -> str | int:
    trainer = restored.config.get("trainer")
    precision = trainer.get("precision", "32-true") if isinstance(trainer, dict) else "32-true"
    if str(precision) not in _PRECISIONS:
        raise CheckpointError(
            f"trainer.precision of the checkpoint is {printable(str(precision))!r}, expected {', '.join(_PRECISIONS)}"
        )
    return precision
