"""A model and data of one's own for lightkit's command, which `conf/` names; the package lightkit has no file of them.

cd examples/own_model
LIGHTKIT_TARGETS=bars python -m lightkit.train --config-dir conf +experiment=bars
LIGHTKIT_TARGETS=bars python -m lightkit.train --config-dir conf +experiment=bars -m model.width=4,8
LIGHTKIT_TARGETS=bars python -m lightkit.evaluate ckpt_path=runs/bars/TIME/checkpoints/best.ckpt

The command trains with lightkit's task, optimizer and report.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A convolution, the maximum over the image and a linear layer; returns logits ``(N, 2)``.

    Args:
        width: the number of channels.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(N, 2)`` of images ``(N, 1, 12, 12)``."""
        return self.head(self.body(images))


class Bars(pl.LightningDataModule):
    """Images ``(1, 12, 12)`` of noise with a horizontal (class 0) or a vertical bar (class 1).

    Args:
        batch_size: the number of images in a batch.
        seed: the seed of the images; lightkit's command passes that of the job.
    """

    num_classes = 2

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(seed)
        images = 0.3 * torch.randn(600, 1, 12, 12, generator=generator)
        labels = torch.randint(2, (600,), generator=generator)
        for image, label, place in zip(images, labels, torch.randint(12, (600,), generator=generator), strict=True):
            image[0, place] += 1 - label
            image[0, :, place] += label
        parts = (slice(400), slice(400, 500), slice(500, None))
        self.parts = [TensorDataset(images[part], labels[part]) for part in parts]

    def train_dataloader(self) -> DataLoader:
        """Returns the loader of 400 images."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns the loader of 100 images."""
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Returns the loader of 100 images."""
        return DataLoader(self.parts[2], self.batch_size)
