"""The configuration of a job as hyperparameters of its loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from lightkit.config import to_plain
from lightkit.loggers import CSVLogger, WandbLogger

# Keys that say how to build objects, and nothing of the job.
_IGNORED = ("_partial_", "_recursive_", "_convert_")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by dotted key, as the command line names them; lists become texts.

    Args:
        node: the configuration, as plain containers.
        prefix: the key of ``node`` with a dot at its end; empty for a whole configuration.
    """
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif key not in _IGNORED:
            is_plain = isinstance(value, (bool, int, float, str))
            found[f"{prefix}{key}"] = value if is_plain else "null" if value is None else str(value)
    return found


def log(trainer: pl.Trainer, config: DictConfig) -> None:
    """Gives the configuration to the loggers of a trainer.

    A ``metrics.csv`` in the run directory lies beside ``config.yaml``, which has the configuration already.

    Args:
        trainer: the trainer; only its process 0 logs.
        config: the configuration of the job.
    """
    if not trainer.is_global_zero:
        return
    values = flatten(to_plain(config))
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).absolute() == Path(config.run_dir).absolute():
            continue
        logger.log_hyperparams(values)
        if isinstance(logger, TensorBoardLogger):
            _add_to_table(logger, values, config.objective)


@contextmanager
def finishing(loggers: list[Logger]) -> Iterator[None]:
    """Ends the runs of Weights & Biases at the end of the context: a sweep runs many jobs in one process.

    Args:
        loggers: the loggers of the job.
    """
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.finish(exit_code)


def _add_to_table(logger: TensorBoardLogger, values: dict[str, Any], objective: str) -> None:
    """Adds the run to TensorBoard's table of hyperparameters, with the metric that the key ``objective`` names."""
    writer = getattr(logger.experiment, "file_writer", None)
    if writer is None:
        # tensorboardX keeps its writer elsewhere.
        return
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(values, {objective: 0.0}):
        writer.add_summary(summary)
