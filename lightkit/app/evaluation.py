"""Evaluation of a checkpoint on its test set, for `lightkit.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightkit._util.printable import printable
from lightkit.app import cluster, ensembles
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.image_sizes import check_image_size
from lightkit.app.parts import model_of
from lightkit.app.restore import RestoredTask, model_errors_as_checkpoint_errors
from lightkit.config import build
from lightkit.data import MNIST, TableDataModule, Text
from lightkit.data.advice import settings_named
from lightkit.errors import CheckpointError, ConfigError
from lightkit.strategies import tpu

# Lightning's precisions that need no further package.
_PRECISIONS = ("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "16", "bf16", "32", "64")


def evaluate(
    ckpt_path: str | Path,
    *,
    data_dir: str | None = None,
    download: bool = True,
    accelerator: str = "auto",
    trust: bool = False,
) -> dict[str, Any]:
    """Computes the test metrics of a checkpoint, as lightkit.train computes them.

    Args:
        ckpt_path: a checkpoint of lightkit.train or an export; it may come from an untrusted source.
        data_dir: the file or directory of the data; None takes the path in the checkpoint. An export has no path.
        download: let the data module download a missing data set.
        accelerator: the argument ``accelerator`` of Lightning's Trainer, or ``"tpu"``.
        trust: allow exports in a format in which a file can run code: see `lightkit.export.open_export`.

    Returns:
        The metrics by name, such as ``test/loss``.

    Raises:
        LightkitError: the checkpoint, its data or an argument cannot be used.
    """
    _, metrics = evaluate_ensemble(
        [Path(ckpt_path)], data_dir=data_dir, download=download, accelerator=accelerator, trust=trust
    )
    return metrics


# evaluate has no settings of its own: it reads a file as the training did.
@settings_named("training with data.")
def evaluate_ensemble(
    paths: Sequence[Path],
    *,
    data_dir: str | None = None,
    download: bool = True,
    accelerator: str = "auto",
    trust: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Computes the test metrics of several checkpoints and of their ensemble.

    Args:
        paths: checkpoints of lightkit.train for the same data; they may come from an untrusted source.
        data_dir: as for `evaluate`.
        download: as for `evaluate`.
        accelerator: as for `evaluate`.
        trust: as for `evaluate`.

    Returns:
        The metrics of each checkpoint, and those of the ensemble; for one checkpoint the two are the same.

    Raises:
        LightkitError: a checkpoint, its data or an argument cannot be used, or the checkpoints make no ensemble.
    """
    free = () if data_dir is None else ensembles.LOCATION_ARGUMENTS
    members = ensembles.restore_members(paths, for_evaluation=True, free=free, trust=trust)
    # Without an ensemble nothing is worth the time of a test.
    combined = ensembles.combine(members)
    data = build_test_data(combined, data_dir, download)
    for member in members:
        check_image_size(data, model_of(member.task), is_trained=True)
    own = [_test(member, data, accelerator) for member in members]
    return own, own[0] if len(own) == 1 else _test(combined, data, accelerator)


def _test(restored: RestoredTask, data: pl.LightningDataModule, accelerator: str) -> dict[str, Any]:
    """Returns the metrics of a task on the test set of a data module."""
    trainer = build(
        {"_target_": "lightning.pytorch.Trainer"},
        **(tpu.choose() if accelerator == "tpu" else {"accelerator": accelerator}),
        devices=1,
        precision=precision_of(restored),
        plugins=[] if accelerator == "tpu" else cluster.plugins(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with model_errors_as_checkpoint_errors(), lightning_errors_as_config_errors():
        (metrics,) = trainer.test(restored.task, datamodule=data, verbose=False)
    return metrics


def build_test_data(restored: RestoredTask, data_dir: str | None, download: bool) -> pl.LightningDataModule:
    """Builds the data module of a checkpoint.

    Args:
        restored: the task of the checkpoint.
        data_dir: the file or directory of the data; None takes the path in the checkpoint, which the function prints
            before the data module reads from it.
        download: let the data module download a missing data set.

    Raises:
        ConfigError: the data module reads from no directory, or an export does not say where its data lie.
    """
    data = restored.build_data()
    place = next((name for name in ensembles.LOCATION_ARGUMENTS if hasattr(data, name)), None)
    if isinstance(data, TableDataModule) and (data_dir is not None or data.test_path is not None):
        # All rows of the file are the test.
        place = "test_path"
    if data_dir is not None:
        if place is None:
            raise ConfigError(f"data_dir: {type(data).__name__} does not read from a directory")
        setattr(data, place, data_dir)
    elif place is not None and getattr(data, place) == "":
        raise ConfigError("data_dir=PATH must say where the data lie: an export has no path of its training")
    elif place is not None and getattr(data, place) is not None:
        print(f"reading {printable(str(getattr(data, place)))}, which the checkpoint names", flush=True)
    if isinstance(data, Text):
        data.is_own = data_dir is not None
    if isinstance(data, MNIST):
        data.download = download
    return data


def precision_of(restored: RestoredTask) -> str | int:
    """Returns the precision of a checkpoint's training.

    Raises:
        CheckpointError: it is no precision of Lightning, or one that needs a further package.
    """
    trainer = restored.config.get("trainer")
    precision = trainer.get("precision", "32-true") if isinstance(trainer, dict) else "32-true"
    if str(precision) not in _PRECISIONS:
        raise CheckpointError(
            f"trainer.precision of the checkpoint is {printable(str(precision))!r}, expected {', '.join(_PRECISIONS)}"
        )
    return precision
