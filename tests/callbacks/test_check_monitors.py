"""A misspelt metric of the validation is an error before the first step."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.trainers import bare_trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightkit.callbacks.check_monitors import CheckMonitors
from lightkit.errors import ConfigError

DATA = DataLoader(torch.ones(4, 2), batch_size=2)


class Net(pl.LightningModule):
    """A module that counts its steps, with a schedule by a metric."""

    def __init__(self, monitor="val/loss"):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.monitor, self.steps = monitor, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.log("train/loss", loss := self.layer(batch).square().sum())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().sum())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        entry = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": entry}


def fit(net, *callbacks, **options):
    bare_trainer(CheckMonitors(), *callbacks, **options).fit(net, DATA, DATA)


@pytest.mark.parametrize("owner", ["the checkpoints", "early stopping", "ReduceLROnPlateau"])
def test_misspelt(tmp_path, owner):
    """The error names the reader of the metric and the metrics that exist, and nothing is trained."""
    net = Net("val/los" if owner == "ReduceLROnPlateau" else "val/loss")
    callbacks = {
        "the checkpoints": [ModelCheckpoint(tmp_path, monitor="val/los")],
        "early stopping": [EarlyStopping("val/los")],
    }
    with pytest.raises(ConfigError, match=f"monitor=val/los of {owner}: .* logs val/loss; did you mean val/loss"):
        fit(net, *callbacks.get(owner, []), enable_checkpointing=owner == "the checkpoints")
    assert net.steps == 0


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss"])
def test_known(tmp_path, monitor):
    """Metrics that the validation logs, and those of the training, which it cannot know, are accepted."""
    net = Net(monitor)
    fit(net, EarlyStopping(monitor), ModelCheckpoint(tmp_path, monitor=monitor), enable_checkpointing=True)
    assert net.steps == 2


def test_without_validation():
    """Without a validation before the training nothing is known."""
    fit(net := Net("train/loss"), EarlyStopping("val/los", strict=False), num_sanity_val_steps=0)
    assert net.steps == 2
