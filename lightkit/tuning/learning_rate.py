"""A range test for the learning rate: the loss of a short training whose learning rate rises in every step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightkit.errors import ConfigError
from lightkit.tuning.trial import run_trial

# The chosen rate is this part of the rate with the lowest loss, where training is about to become unstable.
_PART = 0.1

# The range test ends when the smoothed loss exceeds this multiple of the lowest one.
_DIVERGED = 4.0

# The weight of the earlier losses in the smoothed loss, and the losses on each side in the mean that chooses.
_SMOOTHING, _RADIUS = 0.9, 3

# The losses of the first steps, whose rates change next to nothing, show the noise.
_FIRST = 10


@dataclass(frozen=True)
class LearningRateSearch:
    """The result of `find_learning_rate`.

    Args:
        lr: the chosen learning rate, with two significant digits.
        rates: the learning rate of each step of the range test.
        losses: the loss of each step.
    """

    lr: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]


def find_learning_rate(
    make_module: Callable[[], pl.LightningModule],
    data: pl.LightningDataModule,
    *,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
    steps: int = 100,
    **options: Any,
) -> LearningRateSearch:
    """Finds a learning rate by a range test [1]_.

    The function trains a module while the learning rate rises from ``min_lr`` to ``max_lr`` by the same factor in every
    step. It stops early when the loss diverges. The chosen rate is a tenth of the rate at which the loss was lowest.
    Random generators have the same state afterwards as before.

    Args:
        make_module: a function that returns a new module with one optimizer.
        data: the data module.
        min_lr: the learning rate of the first step.
        max_lr: the learning rate of the last step.
        steps: the number of steps, at least 20.
        **options: further arguments of Lightning's Trainer, such as ``accelerator`` or ``precision``.

    Raises:
        ConfigError: no learning rate lowers the loss beyond its noise.
        ValueError: ``steps`` is below 20, or the learning rates are not positive and rising.

    References:
        .. [1] Smith, Cyclical learning rates for training neural networks, Winter Conference on Applications of
           Computer Vision, 2017.
    """
    if steps < 2 * _FIRST:
        raise ValueError(f"steps must be at least {2 * _FIRST}, got {steps}")
    if not 0 < min_lr < max_lr < math.inf:
        raise ValueError(f"min_lr and max_lr must be positive and rising, got {min_lr} and {max_lr}")
    test = _RangeTest(min_lr, max_lr, steps)
    with isolate_rng():
        run_trial(make_module(), data, steps, test, **options)
    return LearningRateSearch(_choose(test.rates, test.losses), tuple(test.rates), tuple(test.losses))


class _RangeTest(Callback):
    """Sets the learning rate of every step, and records the losses until they diverge."""

    def __init__(self, min_lr: float, max_lr: float, steps: int) -> None:
        self._first, self._factor = min_lr, (max_lr / min_lr) ** (1 / (steps - 1))
        self._shares: list[float] = []
        self._smoothed, self._lowest = 0.0, math.inf
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the ratios of the learning rates of the parameter groups, which stay as they are."""
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise ConfigError(
                "the search for a learning rate needs a module with one optimizer and automatic optimization"
            )
        rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        self._shares = [rate / rates[0] if rates[0] > 0 else 1.0 for rate in rates]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the learning rate."""
        rate = self._first * self._factor**trainer.global_step
        for group, share in zip(trainer.optimizers[0].param_groups, self._shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the loss of a step; ends the training if it diverges."""
        if trainer.global_step <= len(self.losses) or not isinstance(outputs, dict) or "loss" not in outputs:
            return
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        self.rates.append(self._first * self._factor ** (trainer.global_step - 1))
        self.losses.append(loss)
        self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
        smoothed = self._smoothed / (1 - _SMOOTHING ** len(self.losses))
        self._lowest = min(self._lowest, smoothed)
        # The distance from the first losses would be wrong for a loss that may be negative.
        scale = abs(statistics.fmean(self.losses[:_FIRST]) - self._lowest)
        if len(self.losses) > 2 * _FIRST and smoothed > self._lowest + _DIVERGED * max(scale, abs(self._lowest)):
            trainer.should_stop = True


def _choose(rates: list[float], losses: list[float]) -> float:
    """Returns the learning rate that a range test suggests.

    Raises:
        ConfigError: no learning rate lowers the loss beyond its noise.
    """
    problem = "the range test found no learning rate that lowers the loss: set optim.lr to a number"
    if len(losses) < 2 * _FIRST:
        raise ConfigError(f"{problem}; the loss was finite in the first {len(losses)} steps alone")
    means = [statistics.fmean(losses[max(0, i - _RADIUS) : i + _RADIUS + 1]) for i in range(len(losses))]
    lowest = min(range(_FIRST, len(means)), key=means.__getitem__)
    before, noise = statistics.fmean(losses[:_FIRST]), statistics.stdev(losses[:_FIRST])
    if not means[lowest] < before - noise:
        raise ConfigError(f"{problem}; the loss was {before:.4g} at the start and {means[lowest]:.4g} at best")
    return float(f"{_PART * rates[lowest]:.1e}")
