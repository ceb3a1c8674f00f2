"""The latest checkpoint is the latest one, also after a validation that was not the best."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightkit.callbacks import Checkpoint
from lightkit.checkpoints import load_checkpoint


class GetsWorse(pl.LightningModule):
    """Its validation is the best in the first epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("options", "last"), [({}, 3), ({"every_n_epochs": 2}, 2), ({"save_last": False}, None)])
def test_last_is_the_latest(tmp_path, options, last):
    """best.ckpt stays that of the first validation it looked at; last.ckpt follows, as often as asked for."""
    settings = {"filename": "best", "monitor": "val/loss", "mode": "min", "save_last": True, **options}
    batches = DataLoader(torch.ones(2, 1), batch_size=2)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Checkpoint(tmp_path, **settings)],
    ).fit(GetsWorse(), batches, batches)
    assert load_checkpoint(tmp_path / "best.ckpt")["global_step"] == options.get("every_n_epochs", 1)
    path = tmp_path / "last.ckpt"
    assert (load_checkpoint(path)["global_step"] if path.exists() else None) == last
