"""A module whose weights a test of averages follows."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    """A module that keeps its weight before each step, and at each validation and test.

    Args:
        make: a function of the parameters that returns the optimizer.
    """

    def __init__(self, make):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        # A name of the same parameter, as of tied embeddings.
        self.tied = torch.nn.Linear(2, 1, bias=False)
        self.tied.weight = self.layer.weight
        self.make = make
        self.trained, self.validated, self.tested = [], [], []

    def weight(self):
        return self.layer.weight.detach().clone()

    def training_step(self, batch, batch_idx):
        self.trained.append(self.weight())
        return self.layer(batch[0]).sub(1).square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.weight())

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(count):
    """Returns a loader of ``count`` equal batches."""
    return DataLoader(TensorDataset(torch.eye(2).repeat(count, 1)), batch_size=2)
