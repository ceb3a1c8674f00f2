"""The range test finds a rate that trains, says why there is none, and leaves no trace."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask
from lightkit.tuning import find_learning_rate

CPU = {"accelerator": "cpu"}


class Points(pl.LightningDataModule):
    """Points on both sides of a plane, far fewer batches than a range test has steps."""

    def __init__(self, batch_size=8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        points = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(points, (points[:, 0] > 0).long()), self.batch_size, shuffle=True)


def make(optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    return ClassificationTask(torch.nn.Linear(4, 2), partial(optimizer, lr=1e-6), **options)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_search(options):
    """The rate lies where the loss falls, the rates rise from the first to the last, and there is one for each step."""
    random = torch.get_rng_state()
    found = find_learning_rate(make, Points(), min_lr=1e-6, max_lr=100.0, **CPU, **options)
    assert torch.equal(torch.get_rng_state(), random)
    assert 1e-2 <= found.lr <= 10
    assert found.lr == float(f"{found.lr:.1e}")
    assert len(found.rates) == len(found.losses) <= 100
    assert found.rates[0] == pytest.approx(1e-6) and list(found.rates) == sorted(found.rates)
    if len(found.rates) == 100:
        assert found.rates[-1] == pytest.approx(100.0)


def test_ratio_of_groups():
    """Parameter groups keep the ratio of their rates, and a tensor stays a tensor."""
    seen = []

    class Task(ClassificationTask):
        def configure_optimizers(self):
            groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": torch.tensor(2e-6)}]
            return torch.optim.Adam(groups, lr=torch.tensor(1e-6), foreach=False)

        def on_before_zero_grad(self, optimizer):
            seen.append([group["lr"].item() for group in optimizer.param_groups])

    find_learning_rate(lambda: Task(torch.nn.Linear(4, 2)), Points(), steps=20, max_lr=10.0, **CPU)
    assert all(b == pytest.approx(2 * a) for a, b in seen) and len(seen) == 20


class Constant(ClassificationTask):
    """A task that cannot learn."""

    def training_step(self, batch, batch_idx):
        return 0 * self.model.weight.sum() + batch[0].mean()


class Broken(ClassificationTask):
    """A task whose loss is not finite."""

    def training_step(self, batch, batch_idx):
        return self.model.weight.sum() * float("nan")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Constant, "no learning rate that lowers the loss: set optim.lr"),
        (Broken, "the loss was finite in the first 0 steps alone"),
    ],
)
def test_no_rate(task, message):
    """Where no rate lowers the loss, none is invented."""
    with pytest.raises(ConfigError, match=message):
        find_learning_rate(lambda: task(torch.nn.Linear(4, 2)), Points(), **CPU)


def test_wrong_arguments():
    """The error has the argument and its value."""
    with pytest.raises(ValueError, match="steps must be at least 20, got 5"):
        find_learning_rate(make, Points(), steps=5)
    with pytest.raises(ValueError, match=r"positive and rising, got 1\.0 and 0\.1"):
        find_learning_rate(make, Points(), min_lr=1.0, max_lr=0.1)
    with pytest.raises(ConfigError, match="needs a module with one optimizer"):
        find_learning_rate(ManualTask, Points(), **CPU)


class ManualTask(ClassificationTask):
    """A task that optimizes by itself."""

    def __init__(self):
        super().__init__(torch.nn.Linear(4, 2))
        self.automatic_optimization = False
