"""Small trainings of a module that knows nothing of lightkit, for the callbacks of compression."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.optim import Adam


class Module(pl.LightningModule):
    """Convolutions and linear layers that learn which half of an image is brighter."""

    def __init__(self, make=None, sequential=nn.Sequential, dtype=None):
        super().__init__()
        self.net = sequential(
            *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(16 * 9, 24), nn.ReLU(), nn.Linear(24, 2)),
        )
        self.make = make or (lambda parameters: Adam(parameters, lr=0.01))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return self.make(self.parameters())


def loader():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[..., :4].sum((1, 2, 3)) > x[..., 4:].sum((1, 2, 3))).long()), batch_size=8)


def fit(module, *callbacks, epochs=4, ckpt_path=None, **options):
    trainer = bare_trainer(*callbacks, max_epochs=epochs, num_sanity_val_steps=0, **options)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def seeded(*arguments, **options):
    torch.manual_seed(0)
    return Module(*arguments, **options)


class Same:
    """A loader whose batches are all the same: a resumed epoch of a loader without a state begins anew."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter([next(iter(loader()))] * 8)
