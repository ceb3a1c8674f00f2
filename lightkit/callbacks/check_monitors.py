"""A callback that rejects a misspelt metric of the validation before the first training step."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightkit.callbacks.checkpoint import Checkpoint
from lightkit.errors import ConfigError
from lightkit.targets import nearest

# The names of the metrics that a validation logs, by convention.
_VALIDATION_PREFIX = "val"


class CheckMonitors(Callback):
    """Compares the metrics that checkpoints, early stopping and schedulers read with those that a validation logs.

    Lightning validates a few batches before the training (``num_sanity_val_steps``). The callback compares the metrics
    of that validation with the monitors whose names begin with ``val``. Other metrics are known after the first epoch
    alone.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the monitors at the end of the validation before the training.

        Raises:
            ConfigError: the validation logs no such metric; the message has the names of the metrics that it logs.
        """
        if not trainer.sanity_checking:
            return
        known = sorted(trainer.callback_metrics)
        for owner, monitor in _monitors(trainer, known):
            if monitor.startswith(_VALIDATION_PREFIX) and monitor not in known:
                raise ConfigError(
                    f"monitor={monitor} of {owner}: the validation logs {', '.join(known) or 'no metric'}"
                    f"{nearest(monitor, known)}"
                )


def _monitors(trainer: pl.Trainer, known: list[str]) -> Iterator[tuple[str, str]]:
    """Yields each reader of a metric, for messages, and the name of the metric.

    A `Checkpoint` that finds another form of its metric among the ``known`` ones, or does without, is left out.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, Checkpoint) and callback.finds_score(known):
            continue
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            yield "the checkpoints", callback.monitor
        elif isinstance(callback, EarlyStopping) and callback.strict:
            yield "early stopping", callback.monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor is not None:
            yield type(config.scheduler).__name__, config.monitor
