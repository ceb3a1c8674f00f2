"""A callback that measures samples and floating-point operations per second, and the time of the parts of a step."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightkit._util.device_sync import wait_for
from lightkit.flops import FlopCounter, matmul_rate

_PARTS = ("data and loop", "forward", "backward", "optimizer")


class Throughput(Callback):
    """Logs ``train/samples_per_second`` and ``train/gigaflops_per_second`` at the end of every epoch.

    A data module may have an attribute ``unit``, a plural noun that replaces "samples" in the name of the metric
    (``train/images_per_second``), and a method ``count(batch)`` that returns the number of samples of a batch. Without
    ``count`` that number is the length of the first tensor of the batch.

    A rate is the number of samples of all processes divided by the time from the start of an epoch to its end, without
    the validations. ``total`` is the rate over all epochs; ``step`` is the time of the parts of a step.

    `lightkit.flops.FlopCounter` counts the floating-point operations of forward and backward in the first training step
    of a fit. The callback assumes that every sample takes the same number of operations, which is an estimate for
    sequences of different lengths. The counter does not change the results of this step; each operation takes some
    microseconds longer. If the operations cannot be counted (torch.compile, manual optimization, operators of other
    packages), ``train/gigaflops_per_second`` is not logged and the attributes are None.

    Attributes:
        flops_per_sample: the number of floating-point operations of forward and backward for one sample; None before
            the first step, or if the operations cannot be counted.
        fraction_of_matmul_rate: ``flops_per_second`` divided by `lightkit.flops.matmul_rate`, which is measured at the
            end of the fit, or None. The fraction may be above 1, because the operations of the layers are counted and a
            kernel may skip known zeros, as `lightkit.ops.conv_relu_pool` does in backward.
    """

    def __init__(self) -> None:
        self.flops_per_sample: float | None = None
        self.fraction_of_matmul_rate: float | None = None
        self._is_to_count = False
        self._counter: FlopCounter | None = None
        self._counting = ExitStack()
        self._backwards = 0
        self._dtype: torch.dtype | None = None
        self._parts: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self._steps = 0
        self._mark = 0.0
        self._samples = 0
        self._seconds = 0.0
        self._epoch_samples = 0
        self._epoch_seconds = 0.0
        self._since = 0.0

    @property
    def total(self) -> float | None:
        """The samples per second over all epochs; None before the end of the first epoch."""
        return self._samples / self._seconds if self._seconds > 0 else None

    @property
    def flops_per_second(self) -> float | None:
        """The floating-point operations per second over all epochs; None while they or `total` are unknown."""
        operations, samples = self.flops_per_sample, self.total
        return None if operations is None or samples is None else operations * samples

    @property
    def step(self) -> dict[str, float] | None:
        """The mean milliseconds per batch by part: "data and loop", "forward", "backward", "optimizer".

        "data and loop" is the time between two batches: fetching and moving a batch, logging, progress and Lightning.
        The value is None before the end of the first batch, and on other devices than a CPU, where kernels run
        asynchronously.
        """
        if self._steps == 0:
            return None
        return {name: seconds / self._steps * 1e3 for name, seconds in self._parts.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock, and requests the count of the floating-point operations of the first step."""
        self.flops_per_sample = self.fraction_of_matmul_rate = None
        # With manual optimization the forward pass may continue after a backward.
        self._is_to_count = pl_module.automatic_optimization
        # A resumed epoch has no on_train_epoch_start.
        self._start_clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start_clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the part "data and loop", and begins to count the step's operations if the count was requested."""
        self._end_of("data and loop")
        if self._is_to_count:
            self._counter, self._backwards = FlopCounter(), 0
            self._counting.enter_context(self._counter)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """Ends the part "forward"."""
        self._end_of("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the part "backward", and the count of floating-point operations if this step is counted."""
        self._end_of("backward")
        if self._counter is not None:
            self._counting.close()
            self._backwards += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the part "optimizer", adds the samples of the batch, and ends a running count of operations."""
        self._end_of("optimizer")
        if pl_module.device.type == "cpu":
            self._steps += 1
        samples = getattr(_datamodule(trainer), "count", _batch_length)(batch)
        self._epoch_samples += samples
        if self._counter is not None:
            self._end_counting(samples)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock during a validation."""
        if not trainer.sanity_checking:
            self._stop_clock(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock again after a validation."""
        self._resume_clock()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the rates of the epoch."""
        self._abandon_counting()
        self._stop_clock(pl_module)
        if trainer.world_size > 1:
            own = torch.tensor(self._epoch_samples, device=pl_module.device)
            self._epoch_samples = int(trainer.strategy.reduce(own, reduce_op="sum"))
        self._samples += self._epoch_samples
        self._seconds += self._epoch_seconds
        if self._epoch_seconds > 0:
            rate = self._epoch_samples / self._epoch_seconds
            pl_module.log(rate_name(_datamodule(trainer)), rate)
            if self.flops_per_sample is not None:
                pl_module.log("train/gigaflops_per_second", self.flops_per_sample * rate / 1e9)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the rate of a large matrix product, and sets ``fraction_of_matmul_rate``."""
        if (reached := self.flops_per_second) is not None and self._dtype is not None:
            # The training was successful even if there is no memory left for the matrices.
            with suppress(torch.OutOfMemoryError):
                self.fraction_of_matmul_rate = reached / matmul_rate(pl_module.device, self._dtype)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Removes the counter of floating-point operations after an error or Ctrl-C."""
        self._abandon_counting()

    def _end_counting(self, samples: int) -> None:
        counter = self._counter
        assert counter is not None
        self._abandon_counting()
        # After a step without backward, in which training_step returned None, the next step is counted. Steps with
        # several backwards, as those of LBFGS, may differ in their number.
        self._is_to_count = self._backwards == 0
        if self._backwards == 1 and samples > 0 and counter.total:
            self.flops_per_sample, self._dtype = counter.total / samples, counter.dtype

    def _abandon_counting(self) -> None:
        self._counting.close()
        self._counter = None

    def _start_clock(self) -> None:
        self._epoch_samples, self._epoch_seconds = 0, 0.0
        self._resume_clock()

    def _resume_clock(self) -> None:
        self._since = self._mark = time.perf_counter()

    def _end_of(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now

    def _stop_clock(self, pl_module: pl.LightningModule) -> None:
        wait_for(pl_module.device)
        self._epoch_seconds += time.perf_counter() - self._since


def _datamodule(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return getattr(trainer, "datamodule", None)


def rate_name(data: pl.LightningDataModule | None) -> str:
    """Returns the name of the metric of samples per second for a data module; None stands for no data module."""
    return f"train/{getattr(data, 'unit', 'samples')}_per_second"


def _batch_length(batch: Any) -> int:
    """Returns the length of the first tensor of a batch; 0 if there is none."""
    while isinstance(batch, (tuple, list, dict)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if isinstance(batch, torch.Tensor) and batch.dim() > 0 else 0
