"""Trains in two processes that average their weights now and then, by a strategy in a stock Lightning Trainer.

    python examples/strategy.py

`DiLoCo` lets each process step by itself for a period; then an outer optimizer steps along the mean of their changes.
The same object works on one process, on several devices, and under torchrun on several machines.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.optim import SGD
from lightkit.strategies import DiLoCo


class Regression(pl.LightningModule):
    """A linear model, whose exact solution is known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean squared error of a batch ``(N, 8)``, ``(N, 1)``."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.linear(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the inner optimizer; the outer one is the strategy's."""
        return SGD(self.parameters(), lr=0.05)


def main(processes: int = 2, epochs: int = 6) -> float:
    """Trains, and returns the largest distance of a weight from the exact solution."""
    pl.seed_everything(0, verbose=False)
    exact = torch.arange(8.0).unsqueeze(1) / 8
    inputs = torch.randn(1024, 8)
    module = Regression()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        strategy=DiLoCo(period=8, process_group_backend="gloo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, inputs @ exact), batch_size=16, shuffle=True))
    error = (module.linear.weight.detach().T - exact).abs().max().item()
    if trainer.is_global_zero:
        print(f"largest error of a weight: {error:.4f}; sent: {trainer.strategy.communication}")
    return error


if __name__ == "__main__":
    main()
