"""Trains a module that knows nothing of lightkit, with lightkit's callbacks in a stock Lightning Trainer.

    python examples/trainer_with_callbacks.py

`FuseKernels` runs the optimizer, the loss and the convolutions on lightkit's kernels; `LeanLoop` takes most of
Lightning's overhead out of a step. The module, its checkpoints and the Trainer stay as they are.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop


class Classifier(pl.LightningModule):
    """A convolutional network of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 13 * 13, 2),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch of images ``(N, 1, 28, 28)`` and labels ``(N)``."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns torch's own Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def striped_images(count: int) -> TensorDataset:
    """Returns noisy images with horizontal stripes (class 0) or vertical ones (class 1)."""
    labels = torch.arange(count) % 2
    stripes = (torch.arange(28) % 4 < 2).float()
    horizontal, vertical = stripes[:, None].expand(28, 28), stripes[None, :].expand(28, 28)
    images = torch.where(labels[:, None, None] == 0, horizontal, vertical)
    return TensorDataset((images + 0.5 * torch.randn(count, 28, 28)).unsqueeze(1), labels)


def main(epochs: int = 2) -> float:
    """Trains, prints what the callbacks did, and returns the loss of the last step."""
    pl.seed_everything(0, verbose=False)
    fuse, lean = FuseKernels(), LeanLoop()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[fuse, lean],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(striped_images(512), batch_size=32, shuffle=True))
    for found in fuse.report:
        print(found)
    loss = trainer.callback_metrics["loss"].item()
    print(f"loss of the last step: {loss:.4f}")
    return loss


if __name__ == "__main__":
    main()
