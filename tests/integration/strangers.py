"""Modules, models and data as people write them who know nothing of lightkit."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightkit.models import CNN
from lightkit.tasks import ClassificationTask


class Net(nn.Module):
    """A model with an argument of its own, which returns logits."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU())
        self.out = nn.Linear(width, 10)

    def forward(self, images):
        return self.out(self.body(images))


class Wider(CNN):
    """A model that derives from lightkit's and takes the same arguments."""


class Whole(pl.LightningModule):
    """A whole program: model, optimizer, and metrics under names of its own; its test returns no samples."""

    def __init__(self, lr: float = 0.001):
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("test_loss", loss)
        return {"loss": loss, "samples": len(batch[1])}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Predicting(Whole):
    """A program whose ``predict_step`` returns probabilities."""

    def predict_step(self, batch, batch_idx):
        return self(batch).softmax(dim=1)


class Template(pl.LightningModule):
    """A module in the manner of the templates: it gets its parts, saves all of its arguments, and never validates."""

    def __init__(self, model, optimizer, scheduler=None):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return self.hparams.optimizer(params=self.parameters())


class NamedModel(Whole):
    """A program whose argument `model` is a name."""

    def __init__(self, model: str = "small"):
        super().__init__()
        self.name = model


class Stricter(ClassificationTask):
    """A task that derives from lightkit's."""


class Images(pl.LightningDataModule):
    """Data of noise, with a seed, and with neither a number of classes nor a test."""

    def __init__(self, batch: int = 20, seed: int = 5):
        super().__init__()
        self.batch, self.seed = batch, seed
        self.set = TensorDataset(torch.randn(60, 1, 28, 28), torch.arange(60) % 10)

    def train_dataloader(self):
        return DataLoader(self.set, self.batch, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.set, self.batch)
