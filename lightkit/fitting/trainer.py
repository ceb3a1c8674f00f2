"""The Trainer of `lightkit.fit`: lightkit's loop and kernels, few words, and a history of the metrics."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.checkpoints import AtomicCheckpointIO

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def make_trainer(**options: Any) -> pl.Trainer:
    """Returns a Trainer on one device with lightkit's loop and kernels, without logger, checkpoints and bar.

    Args:
        **options: arguments of ``lightning.pytorch.Trainer``; ``callbacks`` come after lightkit's.
    """
    callbacks = [LeanLoop(), FuseKernels(), *options.pop("callbacks", ())]
    # A logger or a bar comes from the callbacks and options of the caller.
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return pl.Trainer(
        **{**nothing, "devices": 1, "enable_progress_bar": has_bar, **options},
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
    )


class History(Callback):
    """Collects the metrics of each epoch.

    Attributes:
        values: the values of each epoch by name: ``loss`` of the training, ``val_loss`` of the validation and so on.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def sorted_values(self) -> dict[str, list[float]]:
        """Returns the values by name: the training before the validation, and each loss first."""
        names = sorted(self.values, key=lambda name: (name.startswith("val_"), not name.endswith("loss"), name))
        return {name: list(self.values[name]) for name in names}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Appends the metrics of the epoch."""
        metrics = trainer.callback_metrics
        for name, value in metrics.items():
            # Lightning logs the mean of an epoch as NAME_epoch, and beside it the value of the last step.
            if name.endswith("_step") or f"{name}_epoch" in metrics:
                continue
            stage, _, metric = name.removesuffix("_epoch").rpartition("/")
            # A LightningModule of the user's own has its own names.
            prefix = {"train": "", "val": "val_"}.get(stage, f"{stage}/" if stage else "")
            self.values[prefix + metric].append(float(value))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences, within the context, Lightning's notes and its advice about loaders and loggers."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in (
                r".*does not have many workers",
                r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
                r".*You defined a `validation_step` but have no `val_dataloader`",
                r".*Total length of .* across ranks is zero",
                r".*The number of training batches .* is smaller than the logging interval",
            ):
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generators within the context, and restores them afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends a training at Ctrl-C within the context, and restores the handler, which Lightning leaves ignored."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    try:
        yield
    except SystemExit as error:
        # Lightning turns a KeyboardInterrupt into a SystemExit.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
    finally:
        if is_main and handler is not None:
            signal.signal(signal.SIGINT, handler)
