"""Throughput counts what was trained, and its parts of a step add up to the time that it took."""

from __future__ import annotations

import time

import pytest
from lightning.pytorch.callbacks import Callback
from plain import Plain, batches, make, trainer

from lightkit.callbacks import LeanLoop, Throughput


class Slow(Plain):
    """Sleeps in known places."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        time.sleep(0.01)

    def on_validation_start(self):
        time.sleep(0.5)


class Clock(Callback):
    """The time of an epoch without its validation."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.started = time.perf_counter()

    def on_validation_start(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.started


@pytest.mark.parametrize("lean", [False, True])
def test_parts_of_a_step(lean):
    """Each part has the time that passed in it, validation has none, and together they are the whole."""
    throughput, clock = Throughput(), Clock()
    callbacks = [clock, throughput, *([LeanLoop()] if lean else [])]
    assert throughput.total is None and throughput.step is None
    trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(make(Slow), batches(), batches())
    step = throughput.step
    assert list(step) == ["data and loop", "forward", "backward", "optimizer"]
    assert step["forward"] > 20 and step["optimizer"] > 10 and step["backward"] > 0
    # What is left out is Lightning's epoch end, what is let in is next to nothing.
    assert sum(step.values()) * 5 / 1e3 <= clock.seconds
    assert sum(step.values()) * 5 / 1e3 > 5 * 0.03
    # Without the time between the last batch and the validation.
    assert throughput.total == pytest.approx(40 / (sum(step.values()) * 5 / 1e3), rel=0.1)
