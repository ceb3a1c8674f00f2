"""Schedules have the length of the training: in epochs, or in steps where steps end it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trainers import bare_trainer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightkit._util.scheduler_calls import count_calls
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask, Schedule

# Ten batches an epoch.
SAMPLES = TensorDataset(torch.zeros(20, 3), torch.zeros(20, dtype=torch.long))


class Stream(IterableDataset):
    """Samples without a known number."""

    def __iter__(self):
        return iter(SAMPLES)


def schedule(make, data=SAMPLES, **options):
    """Returns the scheduler and its interval after a training."""
    task = ClassificationTask(torch.nn.Linear(3, 2), partial(torch.optim.SGD, lr=0.1, momentum=0.9), make)
    trainer = bare_trainer(**options)
    trainer.fit(task, DataLoader(data, batch_size=2))
    (config,) = trainer.lr_scheduler_configs
    return config.scheduler, config.interval


@pytest.mark.parametrize(
    ("limits", "interval", "length"),
    [
        ({"max_epochs": 3}, "epoch", 3),
        ({"max_epochs": -1, "max_steps": 12}, "step", 12),
        # The limit that is reached first ends the training.
        ({"max_epochs": 2, "max_steps": 12}, "step", 12),
        ({"max_epochs": 1, "max_steps": 12}, "epoch", 1),
        # A time may end the training earlier than the epochs.
        ({"max_epochs": 2, "max_time": {"hours": 1}}, "epoch", 2),
        ({"max_epochs": 2, "max_steps": 4, "accumulate_grad_batches": 4}, "step", 4),
    ],
)
def test_length(limits, interval, length):
    """T_max=None is the length of the training, and the rate falls to eta_min at its end."""
    scheduler, unit = schedule(partial(CosineAnnealingLR, T_max=None), **limits)
    assert (unit, scheduler.T_max) == (interval, length)
    assert scheduler.last_epoch == length and scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "interval", "length"),
    [
        (partial(OneCycleLR, max_lr=0.1, total_steps=None), "step", 20),
        (partial(LinearLR, total_iters=None), "epoch", 2),
        (partial(PolynomialLR, total_iters=None), "epoch", 2),
    ],
)
def test_arguments(make, interval, length):
    """Each scheduler of torch with a length takes that of the training; OneCycleLR counts steps."""
    scheduler, unit = schedule(make, max_epochs=2)
    name = "total_steps" if isinstance(scheduler, OneCycleLR) else "total_iters"
    assert (unit, getattr(scheduler, name)) == (interval, length)


def test_given_length_stays():
    """A length that the user gives is a number of epochs, whatever ends the training."""
    scheduler, unit = schedule(partial(CosineAnnealingLR, T_max=7), max_epochs=-1, max_steps=12)
    assert (unit, scheduler.T_max) == ("epoch", 7)
    # OneCycleLR computes its length from these two.
    make = partial(OneCycleLR, max_lr=0.1, total_steps=None, epochs=3, steps_per_epoch=10)
    assert schedule(make, max_epochs=1)[0].total_steps == 30


def test_no_length():
    """A training that only a time ends has no length: the error names what to set."""
    with pytest.raises(ConfigError, match=r"set trainer.max_epochs, trainer.max_steps or scheduler.T_max$"):
        schedule(partial(CosineAnnealingLR, T_max=None), max_epochs=-1, max_time={"seconds": 1})
    with pytest.raises(ConfigError, match=r"the data have no length: set trainer.max_steps or scheduler.total_steps$"):
        schedule(partial(OneCycleLR, max_lr=0.1, total_steps=None), Stream(), max_epochs=2)


@pytest.mark.parametrize(
    ("options", "limits", "interval", "length"),
    [
        ({"interval": "step"}, {"max_epochs": 3}, "step", 30),
        ({"interval": "step"}, {"max_epochs": 3, "accumulate_grad_batches": 4}, "step", 9),
        ({"interval": "step", "frequency": 4}, {"max_epochs": 3}, "step", 6),
        # Batches 4 and 8 of an epoch end a step that counts, and batch 10 ends a step that does not.
        ({"interval": "step", "frequency": 4}, {"max_epochs": 3, "accumulate_grad_batches": 2}, "step", 6),
        ({"interval": "step", "frequency": 5}, {"max_epochs": 3, "accumulate_grad_batches": 4}, "step", 3),
        ({"interval": "step", "frequency": 4}, {"max_epochs": -1, "max_steps": 19}, "step", 4),
        ({"frequency": 2}, {"max_epochs": 5}, "epoch", 2),
        ({"interval": "epoch"}, {"max_epochs": -1, "max_steps": 19}, "epoch", 2),
        ({"interval": "epoch"}, {"max_epochs": 9, "max_steps": 20}, "epoch", 2),
    ],
)
def test_interval_and_frequency(options, limits, interval, length):
    """The length of a schedule is the number of calls that the scheduler gets in the training."""
    scheduler, unit = schedule(Schedule(partial(CosineAnnealingLR, T_max=None), **options), **limits)
    assert (unit, scheduler.T_max) == (interval, length)
    # An epoch that the last step ends early has no call at its end.
    missed = interval == "epoch" and limits.get("max_steps", 0) % 10 != 0
    assert scheduler.last_epoch == length - missed


def test_rate_of_the_optimizer():
    """max_lr=None is the learning rate of the optimizer, also with a length of its own."""
    for make in (
        partial(OneCycleLR, max_lr=None, total_steps=None),
        Schedule(partial(OneCycleLR, max_lr=None, total_steps=40), interval="step"),
    ):
        scheduler, unit = schedule(make, max_epochs=2)
        assert unit == "step"
        assert scheduler.optimizer.param_groups[0]["max_lr"] == pytest.approx(0.1)


def test_metric_of_a_plateau():
    """A ReduceLROnPlateau reads the metric of the schedule, after each step if that is the interval."""
    seen = []

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(float(metrics))

    schedule(Schedule(Plateau, interval="step", monitor="train/loss"), max_epochs=1)
    # Gradient descent on equal samples lowers the loss in each step.
    assert len(seen) == 10 and seen == sorted(seen, reverse=True) and seen[0] > seen[-1] > 0


@pytest.mark.parametrize(
    "wrong", [{"interval": "steps"}, {"frequency": 0}, {"frequency": True}, {"frequency": 1.0}, {"monitor": ""}]
)
def test_wrong_values(wrong):
    """The error has the key, its value and what was expected."""
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"scheduler\.{name} must be .*, got {value!r}"):
        Schedule(partial(CosineAnnealingLR, T_max=None), **wrong)


@given(batches=st.integers(1, 30), accumulate=st.integers(1, 7), frequency=st.integers(1, 9), steps=st.integers(0, 100))
def test_number_of_calls(batches, accumulate, frequency, steps):
    """`count_calls` counts what Lightning's loop does, batch by batch."""
    calls = done = 0
    while done < steps:
        for batch in range(1, batches + 1):
            if done < steps and (batch % accumulate == 0 or batch == batches):
                done += 1
                calls += batch % frequency == 0
    assert count_calls(steps, frequency, batches, accumulate) == calls
