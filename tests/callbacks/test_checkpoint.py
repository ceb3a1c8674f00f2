"""last.ckpt is the latest checkpoint, also after a validation that was not the best."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from support.trainers import bare_trainer
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
    """best.ckpt stays that of the first validation; last.ckpt follows at every configured interval."""
    settings = {"filename": "best", "monitor": "val/loss", "mode": "min", "save_last": True, **options}
    batches = DataLoader(torch.ones(2, 1), batch_size=2)
    callback = Checkpoint(tmp_path, **settings)
    trainer = bare_trainer(callback, max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(GetsWorse(), batches, batches)
    assert load_checkpoint(tmp_path / "best.ckpt")["global_step"] == options.get("every_n_epochs", 1)
    path = tmp_path / "last.ckpt"
    assert (load_checkpoint(path)["global_step"] if path.exists() else None) == last


@pytest.mark.parametrize(
    "elsewhere", ["{0}/precious.ckpt", "{0}/run/../precious.ckpt", "memory://precious", "http://x"]
)
def test_a_strangers_state_names_no_file_of_the_users(tmp_path, elsewhere):
    """An untrusted state cannot make Lightning remove, read or fetch a file elsewhere."""
    (tmp_path / "stranger").mkdir()
    precious = tmp_path / "precious.ckpt"
    precious.write_text("mine")
    path = elsewhere.format(tmp_path)
    batches = DataLoader(torch.ones(2, 1), batch_size=2)
    settings = {"filename": "best", "monitor": "val/loss", "mode": "max", "save_last": True, "save_top_k": 1}
    trainer = bare_trainer(Checkpoint(tmp_path / "stranger", **settings), enable_checkpointing=True)
    trainer.fit(GetsWorse(), batches, batches)
    crafted = load_checkpoint(tmp_path / "stranger" / "last.ckpt")
    (state,) = (state for key, state in crafted["callbacks"].items() if key.startswith("Checkpoint"))
    del state["dirpath"]
    names = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), path)
    state.update(names, best_k_models={path: torch.tensor(-1.0)}, best_model_score=torch.tensor(-1.0))
    torch.save(crafted, tmp_path / "stranger" / "crafted.ckpt")
    callback = Checkpoint(tmp_path / "run", **settings)
    removed = []
    trainer = bare_trainer(callback, max_epochs=3, enable_checkpointing=True)
    trainer.strategy.remove_checkpoint = removed.append
    trainer.fit(GetsWorse(), batches, batches, ckpt_path=tmp_path / "stranger" / "crafted.ckpt")
    assert precious.read_text() == "mine"
    assert all(str(name).startswith(str(tmp_path / "run")) for name in removed)
    assert callback.best_model_path == str(tmp_path / "run" / "best.ckpt")
