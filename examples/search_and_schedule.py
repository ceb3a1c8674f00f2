"""Searches for a batch size and a learning rate, and trains with a warm-up and an average of the last epochs.

    python examples/search_and_schedule.py

The words ``data.batch_size=auto optim.lr=auto scheduler=warmup_cosine callbacks=[default,swa,summary]`` do the same on
the command line.
"""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import PrintSummary, StochasticWeightAveraging
from lightkit.optim import Adam, WarmupCosine
from lightkit.tasks import ClassificationTask, Schedule
from lightkit.tuning import find_batch_size, find_learning_rate


class Rings(pl.LightningDataModule):
    """Points of two classes: within a ring, and outside of it."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Returns 2,048 points ``(N, 2)`` and labels ``(N)``."""
        points = torch.randn(2048, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(points, (points.norm(dim=1) > 1.2).long()), self.batch_size, shuffle=True)


def make_task(lr: float = 1e-3) -> ClassificationTask:
    """Returns a new task, whose schedule lasts as long as the training."""
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    schedule = Schedule(partial(WarmupCosine, total_steps=None, warmup=0.1), interval="step")
    return ClassificationTask(model, partial(Adam, lr=lr, max_grad_norm=1.0), schedule)


def main(epochs: int = 3) -> float:
    """Searches, trains, and returns the loss of the last step."""
    pl.seed_everything(0, verbose=False)
    data = Rings()
    size = find_batch_size(make_task, data, accelerator="cpu")
    data.batch_size = size.batch_size
    rate = find_learning_rate(make_task, data, accelerator="cpu")
    print(f"batch size {size.batch_size} ({size.reason}), learning rate {rate.lr}")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[PrintSummary(), StochasticWeightAveraging(start=0.5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_task(rate.lr), data)
    return trainer.callback_metrics["train/loss"].item()


if __name__ == "__main__":
    main()
