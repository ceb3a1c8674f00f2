"""How many samples and operations a second training gets through, and what a step's time goes into."""

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

    A data module may say what its samples are called in the plural (``unit``: ``train/images_per_second``), and how
    many there are in a batch (``count(batch)``); else it is the length of the first tensor.

    Counts the samples of all processes, and the time of training alone: from the start of an epoch to its last
    batch, without the validation in it. ``total`` has the figure of all epochs together, ``step`` what the time
    of a step goes into.

    The floating-point operations are counted in the first training step of a fit, forward and backward without the
    optimizer, by `lightkit.flops.FlopCounter`, and taken to be as many for every sample: of sequences whose lengths
    differ from batch to batch the figure is an estimate. The step gives the same to the bit, but takes some
    microseconds longer an operation. Where they cannot be counted (torch.compile, manual optimization, operations of
    other packages) nothing is logged of them and the attributes are None.

    Attributes:
        flops_per_sample: operations of forward and backward for a sample.
        fraction_of_matmul_rate: ``flops_per_second`` as a part of what a large matrix product reaches, measured at
            the end of the fit; see `lightkit.flops.matmul_rate`. It is above 1 where a kernel leaves out what it can
            know to be 0, as `lightkit.ops.conv_relu_pool` does in backward: what is counted are the layers.
    """

    def __init__(self) -> None:
        self.flops_per_sample: float | None = None
        self.fraction_of_matmul_rate: float | None = None
        self._is_to_count = False
        self._counter: FlopCounter | None = None
        self._counting = ExitStack()
        self._backwards = 0
        self._dtype: torch.dtype | None = None
        self._parts = dict.fromkeys(_PARTS, 0.0)
        self._steps = 0
        self._mark = 0.0
        self._samples = 0
        self._seconds = 0.0
        self._epoch_samples = 0
        self._epoch_seconds = 0.0
        self._since = 0.0

    @property
    def total(self) -> float | None:
        """Samples a second over all epochs, or None before any has been trained."""
        return self._samples / self._seconds if self._seconds > 0 else None

    @property
    def flops_per_second(self) -> float | None:
        """Floating-point operations a second over all epochs, or None where they are not known."""
        known = self.flops_per_sample is not None and self.total is not None
        return self.flops_per_sample * self.total if known else None

    @property
    def step(self) -> dict[str, float] | None:
        """Milliseconds of a batch in the mean, by part: forward, backward, optimizer, and the rest of the loop.

        The rest is what comes between two batches: fetching and moving the next one, logging, progress, and
        Lightning. None before any batch has been trained, and where kernels run on after Python has moved on.
        """
        if self._steps == 0:
            return None
        return {name: seconds / self._steps * 1e3 for name, seconds in self._parts.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the next step counted."""
        self.flops_per_sample = self.fraction_of_matmul_rate = None
        # Who optimizes manually may go on with the forward pass after any backward.
        self._is_to_count = pl_module.automatic_optimization
        # An epoch that goes on in the middle does not start.
        self._start_clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start_clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._end_of("data and loop")
        if self._is_to_count:
            self._counter, self._backwards = FlopCounter(), 0
            self._counting.enter_context(self._counter)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """The loss is there."""
        self._end_of("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients are there."""
        self._end_of("backward")
        if self._counter is not None:
            self._counting.close()
            self._backwards += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a batch."""
        self._end_of("optimizer")
        if pl_module.device.type == "cpu":
            self._steps += 1
        samples = getattr(trainer.datamodule, "count", _batch_length)(batch)
        self._epoch_samples += samples
        if self._counter is not None:
            self._end_counting(samples)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock for a validation within training."""
        if not trainer.sanity_checking:
            self._stop_clock(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts it again."""
        self._resume_clock()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the figures of the epoch."""
        self._abandon_counting()
        self._stop_clock(pl_module)
        if trainer.world_size > 1:
            mine = torch.tensor(self._epoch_samples, device=pl_module.device)
            self._epoch_samples = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        self._samples += self._epoch_samples
        self._seconds += self._epoch_seconds
        if self._epoch_seconds > 0:
            rate = self._epoch_samples / self._epoch_seconds
            pl_module.log(rate_name(trainer.datamodule), rate)
            if self.flops_per_sample is not None:
                pl_module.log("train/gigaflops_per_second", self.flops_per_sample * rate / 1e9)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what the machine could do."""
        if (reached := self.flops_per_second) is not None:
            # Without room for the matrices the training itself was a success.
            with suppress(torch.OutOfMemoryError):
                self.fraction_of_matmul_rate = reached / matmul_rate(pl_module.device, self._dtype)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves nothing behind that watches."""
        self._abandon_counting()

    def _end_counting(self, samples: int) -> None:
        counter = self._counter
        self._abandon_counting()
        # Without a backward, as where training_step returns None, the next step is counted; with several, as LBFGS has
        # them, not every step need have as many.
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


def rate_name(data: pl.LightningDataModule | None) -> str:
    """What the samples a second of a data module are logged as."""
    return f"train/{getattr(data, 'unit', 'samples')}_per_second"


def _batch_length(batch: Any) -> int:
    """The samples in a batch, by its first tensor; 0 where there is none."""
    while isinstance(batch, (tuple, list, dict)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if isinstance(batch, torch.Tensor) and batch.dim() > 0 else 0
