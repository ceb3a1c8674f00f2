"""A usual LightningModule and its training, without an import of lightkit."""

from __future__ import annotations

import functools

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

LOSSES = {
    "attribute": lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1),
    "full name": lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    "nn.functional": lambda logits, labels: nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    "imported by name": lambda logits, labels: cross_entropy(logits, labels, label_smoothing=0.1),
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
}


class Plain(pl.LightningModule):
    def __init__(self, loss=F.cross_entropy, **options):
        super().__init__()
        # The loss, a function or a module, is pickled with every checkpoint.
        self.save_hyperparameters()
        self.layer = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.loss = loss
        self.options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True, **options}
        self.losses = []

    def forward(self, inputs):
        return self.head(torch.relu(self.layer(inputs)))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = self.loss(self(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_loss", self.loss(self(inputs), labels))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make(cls=Plain, *arguments, **options):
    """Returns a module with the same weights every time."""
    torch.manual_seed(0)
    return cls(*arguments, **options)


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator)
    labels = torch.randint(0, 3, (40,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def trainer(*callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
