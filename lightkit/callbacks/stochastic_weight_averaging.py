"""A callback that averages the weights of the last epochs: stochastic weight averaging."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging

from lightkit._util.strategy_traits import traits_of
from lightkit.errors import ConfigError


class StochasticWeightAveraging(WeightAveraging):
    """Validates, tests and keeps the mean of the weights at the ends of the last epochs [1]_.

    From the end of the first averaged epoch on, validations run with the mean, ``state_dict`` of a checkpoint is the
    mean, and ``current_model_state`` has the weights from which a resumed training goes on. After the training the
    module has the mean. The buffers, such as the statistics of a batch norm, are averaged too. Before that epoch, and
    in a training that ends before it, everything is as without the callback.

    The callback leaves the learning rate as it is: the mean differs most from the last weights if the learning rate
    does not go to zero. Lightning's ``StochasticWeightAveraging`` sets the learning rate itself, and its checkpoints
    have the weights of the training.

    Args:
        start: the part of the training that is not averaged: a share below 1 of its epochs, or of its steps if
            ``max_steps`` ends it first; or a whole number of epochs.

    Raises:
        ConfigError: ``start`` is no such number; the training has no limit, of which ``start`` is a share; the
            processes train separate weights; or the optimizer keeps averages of its own (``ema_decay``).

    References:
        .. [1] Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, Averaging weights leads to wider optima and better
           generalization, Conference on Uncertainty in Artificial Intelligence, 2018.
    """

    def __init__(self, start: float = 0.75) -> None:
        is_number = isinstance(start, (int, float)) and not isinstance(start, bool)
        if not is_number or not 0 <= start < math.inf or (start >= 1 and start != int(start)):
            raise ConfigError(f"start must be a share from 0 to 1 or a whole number of epochs, got {start!r}")
        super().__init__()
        self.start = start
        self._fitting: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies the module for the averages."""
        if stage == "fit":
            self._fitting = trainer
            if 0 < self.start < 1 and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
                raise ConfigError(
                    f"start={self.start} is a share of the training, which has no limit: set trainer.max_epochs or "
                    "trainer.max_steps, or a number of epochs"
                )
            if traits_of(trainer.strategy).trains_locally and trainer.world_size > 1:
                raise ConfigError(
                    f"stochastic weight averaging needs processes with the same weights, and those of "
                    f"{type(trainer.strategy).__name__} differ: use strategy=ddp"
                )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects an optimizer with averages of its own."""
        if any(group.get("ema_decay") is not None for opt in trainer.optimizers for group in opt.param_groups):
            raise ConfigError(
                "stochastic weight averaging and optim.ema_decay are two averages of the weights: choose one"
            )

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Returns True after the last step of an epoch that is averaged: its validation needs the mean.

        Args:
            step_idx: the index of the last step; None at the end of an epoch.
            epoch_idx: the index of the last epoch; None at the end of a step.
        """
        trainer = self._fitting
        if step_idx is None or trainer is None:
            return False
        ends_training = 0 < trainer.max_steps <= trainer.global_step
        if not (trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or ends_training):
            return False
        if self.start >= 1:
            return trainer.current_epoch >= self.start
        done = [trainer.current_epoch + 1, trainer.global_step]
        limits = [trainer.max_epochs, trainer.max_steps]
        return self.start == 0 or any(n > self.start * m for n, m in zip(done, limits, strict=True) if m and m > 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the means into ``state_dict`` once there are any."""
        if self._has_averages():
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads the means and the weights of the training; a checkpoint without means has the weights alone."""
        if self._average_model is not None and "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the module the means, if there are any."""
        if self._has_averages():
            super().on_train_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the trainer, and the means, which the module now has."""
        self._fitting = self._average_model = None

    def _has_averages(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        # Before the first update Lightning's copy has the weights from before the training.
        if self._has_averages():
            super()._swap_models(pl_module)
