"""Brings the lean training loop to any LightningModule."""

from __future__ import annotations

from contextlib import ExitStack

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightkit.data.slices import fetch_slices
from lightkit.loops import LeanEpochLoop, obstacle


class LeanLoop(Callback):
    """Takes most of Lightning's overhead out of a training step: ``Trainer(callbacks=[LeanLoop()])``.

    Weights, running values, counters, checkpoints, the hooks that somebody implements and their order are the
    same to the bit; see `lightkit.loops.LeanEpochLoop`. Which callbacks, hooks and schedulers there are is looked up
    at the start of an epoch and after each validation. What is not done in every step any more is what nobody sees
    there: collecting metrics that no logger takes, writing the loggers' files more than once a second, drawing a
    progress bar more than ten times a second, looking up hooks that are empty, checking the options of ``self.log``
    anew.

    A ``DataLoader`` over a ``TensorDataset`` gives the same batches by slicing: see `lightkit.data.fetch_slices`.

    Works on one device, with Lightning's ``DDPStrategy`` and with the strategies of `lightkit.strategies`. Where
    Lightning's step is another one than this loop knows (manual optimization, FSDP, a GradScaler, a profiler, an
    overridden ``optimizer_step``) all stays as it is, and ``obstacle`` says why.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        # By trainer: one callback may serve several, also one within the other.
        self._undo: dict[int, ExitStack] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Changes the loop, when everything has been set up."""
        self.obstacle = obstacle(trainer)
        if self.obstacle is None:
            trainer.fit_loop.epoch_loop.__class__ = LeanEpochLoop
        else:
            rank_zero_warn(f"LeanLoop leaves Lightning's loop as it is: {self.obstacle}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the loaders slice, new ones among them."""
        if type(trainer.fit_loop.epoch_loop) is not LeanEpochLoop:
            return
        combined = trainer.fit_loop._combined_loader
        iterators = combined._iterator.iterators if combined._iterator is not None else []
        for loader in combined.flattened:
            if (undo := fetch_slices(loader, iterators)) is not None:
                self._undo.setdefault(id(trainer), ExitStack()).callback(undo)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the loaders: the next epoch may have others."""
        self._undo.pop(id(trainer), ExitStack()).close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes all of it Lightning's and torch's again."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise, where the training does not come to its end."""
        self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        self._undo.pop(id(trainer), ExitStack()).close()
        loop = trainer.fit_loop.epoch_loop
        if type(loop) is LeanEpochLoop:
            loop.__class__ = _TrainingEpochLoop
