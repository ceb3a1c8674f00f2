"""A learning-rate scheduler: a linear warm-up, then a half cosine down to the end of the training."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Raises the learning rate linearly during a warm-up, and then lowers it along a half cosine to ``eta_min``.

    In step ``t`` of the warm-up of ``w`` steps, counted from 0, the learning rate is that of the optimizer times
    ``(t + 1) / (w + 1)``. In step ``w`` it is the optimizer's own, and from step ``total_steps`` on it is ``eta_min``.
    A step is a call of the scheduler. Parameter groups may have different learning rates.

    Args:
        optimizer: the optimizer.
        total_steps: the number of steps of the whole schedule.
        warmup: the length of the warm-up: a share of ``total_steps`` if it is below 1, else a number of steps. A
            schedule that is shorter than its warm-up ends within it.
        eta_min: the learning rate at the end.
        last_epoch: the number of steps that are done; -1 starts the schedule.

    Raises:
        ValueError: ``total_steps`` is below 1, ``warmup`` is negative or no whole number from 1, or ``eta_min`` is
            negative.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number from 1, got {total_steps!r}")
        if isinstance(warmup, bool) or not 0 <= warmup < math.inf or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup must be a share from 0 to 1 or a whole number of steps, got {warmup!r}")
        if not 0 <= eta_min < math.inf:
            raise ValueError(f"eta_min must be at least 0, got {eta_min!r}")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rate of each parameter group in the present step."""
        step, warmup = self.last_epoch, self.warmup_steps
        if step < warmup:
            return [base * (step + 1) / (warmup + 1) for base in self.base_lrs]
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return [self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * done)) / 2 for base in self.base_lrs]
