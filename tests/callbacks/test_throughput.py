"""Throughput counts samples and operations, and the parts of a step add up to its time."""

from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from plain import Plain, batches, make, trainer
from torch import nn

from lightkit.callbacks import FuseKernels, LeanLoop, Throughput

# The operations of a sample: both linear maps three times, without the gradient of the input.
PLAIN_STEP = 2 * (3 * (4 * 8 + 8 * 3) - 4 * 8)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Resets torch.compile before the test, and checks that no dispatch mode is left after it."""
    torch._dynamo.reset()
    yield
    assert watching() == 0


def watching():
    return torch._C._len_torch_dispatch_stack()


class Slow(Plain):
    """Sleeps at known places."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        time.sleep(0.01)

    def on_validation_start(self):
        time.sleep(0.5)


class Clock(Callback):
    """Measures the time of an epoch without its validation."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.started = time.perf_counter()

    def on_validation_start(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.started


@pytest.mark.parametrize("lean", [False, True])
def test_parts_of_a_step(lean):
    """Each part has its own time, validation has none, and the sum is the whole."""
    throughput, clock = Throughput(), Clock()
    callbacks = [clock, throughput, *([LeanLoop()] if lean else [])]
    assert throughput.total is None and throughput.step is None
    trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(make(Slow), batches(), batches())
    step = throughput.step
    assert list(step) == ["data and loop", "forward", "backward", "optimizer"]
    assert step["forward"] > 20 and step["optimizer"] > 10 and step["backward"] > 0
    # The clock leaves out Lightning's end of an epoch, and adds next to nothing.
    assert sum(step.values()) * 5 / 1e3 <= clock.seconds
    assert sum(step.values()) * 5 / 1e3 > 5 * 0.03
    # The time between the last batch and the validation is left out.
    assert throughput.total == pytest.approx(40 / (sum(step.values()) * 5 / 1e3), rel=0.1)


class Watched(Plain):
    """Records in which steps a dispatch mode is active."""

    def __init__(self, **options):
        super().__init__(**options)
        self.watched = []

    def training_step(self, batch, batch_idx):
        self.watched.append(watching())
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        assert watching() == 0


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulating"])
@pytest.mark.parametrize("lean", [False, True])
def test_operations(lean, options):
    """Forward and backward of one step are counted, and related to the time and to a matrix product."""
    throughput, lean_loop = Throughput(), LeanLoop()
    module = make(Watched)
    job = trainer(throughput, *([lean_loop] if lean else []), **options)
    assert throughput.flops_per_second is None
    job.fit(module, batches(), batches())
    assert lean_loop.unsupported_reason is None
    assert module.watched == [1] + [0] * 9
    assert throughput.flops_per_sample == PLAIN_STEP
    assert throughput.flops_per_second == pytest.approx(PLAIN_STEP * throughput.total)
    assert 0 < throughput.fraction_of_matmul_rate < 1
    rates = {name: job.callback_metrics[f"train/{name}_per_second"].item() for name in ("samples", "gigaflops")}
    assert rates["gigaflops"] == pytest.approx(rates["samples"] * PLAIN_STEP / 1e9)


class Convolutional(Plain):
    """Has everything that FuseKernels replaces."""

    def __init__(self, **options):
        super().__init__(**options)
        self.layer = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(3, 8)
        )

    def forward(self, inputs):
        return self.head(torch.relu(self.layer(inputs.view(-1, 1, 2, 2))))


@pytest.mark.parametrize("cls", [Plain, Convolutional])
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 3}, {"precision": "bf16-true"}],
    ids=lambda options: options.get("precision"),
)
@pytest.mark.parametrize("fused", [False, True])
def test_counting_changes_nothing(cls, options, fused):
    """Losses and weights are the same to the bit with either kernels."""
    outcomes = []
    for counted in (False, True):
        throughput = Throughput()
        callbacks = [FuseKernels()] if fused else []
        module = make(cls)
        trainer(*callbacks, *([throughput] if counted else []), **options).fit(module, batches())
        outcomes.append((module.losses, list(module.parameters())))
    assert throughput.flops_per_sample > 0
    (losses, weights), (losses_counted, weights_counted) = outcomes
    assert losses == losses_counted
    assert all(map(torch.equal, weights, weights_counted))


class Skips(Watched):
    """Returns no loss in two steps, then a loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if len(self.watched) <= 2 else loss

    def on_before_optimizer_step(self, optimizer):
        # A step without backward is known at its end only.
        assert watching() == (len(self.watched) <= 2)


class Fails(Watched):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise self.error


class Stops(Watched):
    def on_train_batch_start(self, batch, batch_idx):
        return -1


@pytest.mark.parametrize("lean", [False, True])
def test_a_step_without_backward(lean):
    """The next step with a loss is counted."""
    throughput, module = Throughput(), make(Skips)
    trainer(throughput, *([LeanLoop()] if lean else [])).fit(module, batches())
    assert module.watched == [1, 1, 1] + [0] * 7
    assert throughput.flops_per_sample == PLAIN_STEP


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopIteration])
def test_a_step_that_fails(error):
    """No dispatch mode is left (see the fixture), and the next fit is counted."""
    throughput = Throughput()
    try:
        trainer(throughput).fit(make(Fails, error=error), batches())
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not StopIteration
    assert watching() == 0 and throughput.flops_per_sample is None
    trainer(throughput).fit(make(Stops), batches())
    assert watching() == 0 and throughput.flops_per_sample is None
    trainer(throughput).fit(make(Plain), batches())
    assert throughput.flops_per_sample == PLAIN_STEP


class Manual(Watched):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Repeats(Plain):
    """An optimizer that runs forward and backward several times a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Compiled(Watched):
    def __init__(self):
        super().__init__()
        self.layer.compile(backend="eager")


@pytest.mark.parametrize("cls", [Manual, Repeats, Compiled])
def test_steps_that_cannot_be_counted(cls):
    """No operations are logged, and compiled code runs without a dispatch mode."""
    throughput, module = Throughput(), make(cls)
    job = trainer(throughput)
    job.fit(module, batches())
    assert throughput.total > 0
    assert throughput.flops_per_sample is throughput.flops_per_second is throughput.fraction_of_matmul_rate is None
    assert "train/gigaflops_per_second" not in job.callback_metrics
    assert not any(getattr(module, "watched", []))


def test_an_epoch_that_goes_on_in_the_middle(tmp_path):
    """A resumed epoch has the time of its remaining batches only."""
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(saving, max_epochs=1, enable_checkpointing=True).fit(make(), batches())
    throughput, started = Throughput(), time.perf_counter()
    trainer(throughput, max_epochs=1).fit(make(), batches(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=False)
    # Three batches of eight are left.
    assert 3 * 8 / throughput.total < time.perf_counter() - started
