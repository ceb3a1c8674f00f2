"""A callback that validates, tests and saves the averages that lightkit's optimizers keep of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightkit._util.strategy_traits import traits_of
from lightkit.optim.fused import FusedStep

# The key of a checkpoint with the weights that the training goes on from; Lightning's WeightAveraging uses it too.
CURRENT_KEY = "current_model_state"


class AveragedWeights(Callback):
    """Uses the averages that an optimizer with ``ema_decay`` keeps wherever weights are judged or kept.

    A validation within a training runs with the averages, and after the training the module has the averages. In a
    checkpoint ``state_dict`` has the averages, which a test, an evaluation and a prediction load, and
    ``current_model_state`` has the weights from which a resumed training continues. Parameters without an average, and
    buffers such as the statistics of a batch norm, have their own values throughout. Where each process trains by
    itself, as in `lightkit.strategies.LocalSGD`, the averages are the means over the processes.

    Without ``ema_decay`` the callback only resumes from checkpoints that have such weights.
    """

    def __init__(self) -> None:
        self._swapped = ExitStack()
        self._means: dict[Tensor, Tensor] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the parameters to their averages, after the strategy has brought both up to date."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swapped.enter_context(_set_to(_averages(trainer)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the parameters their own values back, before a checkpoint is saved."""
        self._swapped.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the parameters their own values back if the validation has failed."""
        self._swapped.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes the means over the processes while the strategy still communicates."""
        if traits_of(trainer.strategy).trains_locally:
            self._means = _averages(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the averages to the parameters, after the last checkpoint has been saved."""
        _copy(self._means or _averages(trainer))
        self._means = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Moves the weights to ``current_model_state``, and puts their averages into ``state_dict``."""
        averages = _averages(trainer)
        if not averages:
            return
        # A tied parameter has several names.
        named = pl_module.named_parameters(remove_duplicate=False)
        renewed = {name: averages[p].to(p.dtype) for name, p in named if p in averages}
        weights = checkpoint["state_dict"]
        checkpoint[CURRENT_KEY] = weights
        checkpoint["state_dict"] = {name: renewed.get(name, value) for name, value in weights.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads the weights that a training continues from; a test keeps the averages, which Lightning has loaded."""
        if trainer.state.fn == TrainerFn.FITTING and CURRENT_KEY in checkpoint:
            trainer.strategy.load_model_state_dict({"state_dict": checkpoint[CURRENT_KEY]})


def _averages(trainer: pl.Trainer) -> dict[Tensor, Tensor]:
    """Returns the average of each parameter that has one, on the device of the parameter."""
    averages: dict[Tensor, Tensor] = {}
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, FusedStep):
            averages |= optimizer.averages()
    if traits_of(trainer.strategy).trains_locally:
        averages = {p: trainer.strategy.reduce(average.clone(), reduce_op="mean") for p, average in averages.items()}
    return averages


@contextmanager
def _set_to(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Gives tensors the ``values`` by tensor within the context, and their own values afterwards."""
    own = {tensor: tensor.detach().clone() for tensor in values}
    try:
        _copy(values)
        yield
    finally:
        _copy(own)


@torch.no_grad()
def _copy(values: dict[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)
