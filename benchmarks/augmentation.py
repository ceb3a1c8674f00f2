"""Measures what the random changes of training images cost, beside a training step of the documented CNN.

    python benchmarks/augmentation.py [--batch 32] [--seconds 20]

A step converts a batch of uint8 images as the data module does, changes it by `data.transform`, and trains: loss,
gradients, Adam, on lightkit's kernels. Steps without a transform, with ``light`` and with ``strong`` take turns, and so
does the conversion alone. The figures are those of the fastest call, which other programs disturb least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rows import append
from timing import interleaved
from torch import Tensor

from lightkit.data import ImageDataModule, ImageSet
from lightkit.data.batches import BatchNumber
from lightkit.models import CNN
from lightkit.nn import CrossEntropyLoss
from lightkit.optim import Adam

TRANSFORMS = ("none", "light", "strong")

# The kinds of images: channels, and height and width in pixels.
IMAGES = {"grey": (1, 28), "colour": (3, 32)}


class Noise(ImageDataModule):
    """A data module of random images."""

    classes = tuple("0123456789")

    def __init__(self, channels: int, size: int, transform: str) -> None:
        super().__init__(transform=None if transform == "none" else transform)
        self.channels, self.image_size = channels, size

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Raises an error: the benchmark makes its batches itself."""
        raise NotImplementedError


def converting(data: Noise, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Returns a function that converts and changes a batch; each call has another number."""
    numbers = iter(range(1 << 60))
    if not data.transform:
        return lambda: data.on_after_batch_transfer((images, labels), 0)[0]
    return lambda: data.on_after_batch_transfer((images, labels, BatchNumber(0, next(numbers), 0)), 0)[0]


def training(convert: Callable[[], Tensor], labels: Tensor, channels: int, size: int) -> Callable[[], None]:
    """Returns a function that makes a training step on a converted batch."""
    torch.manual_seed(0)
    model, loss = CNN(in_channels=channels, image_size=size), CrossEntropyLoss()
    optimizer = Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(convert()), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measures, prints and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--note", default="", help="what is different this time, such as the state of the machine")
    options = parser.parse_args()
    rows = []
    for kind, (channels, size) in IMAGES.items():
        shape = (options.batch, size, size) if channels == 1 else (options.batch, channels, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        labels = torch.randint(0, 10, (options.batch,))
        functions: dict[str, Callable[[], object]] = {}
        for name in TRANSFORMS:
            convert = converting(Noise(channels, size, name), images, labels)
            functions[f"{name} alone"] = convert
            functions[f"{name} step"] = training(convert, labels, channels, size)
        times = interleaved(functions, options.seconds)
        fastest = {name: min(found) for name, found in times.items()}
        plain = fastest["none alone"]
        for name in TRANSFORMS:
            rows.append(
                {
                    "images": f"{kind}, {size} x {size}",
                    "batch": options.batch,
                    "transform": name,
                    "converted_per_second": round(options.batch / fastest[f"{name} alone"]),
                    "trained_per_second": round(options.batch / fastest[f"{name} step"]),
                    "share_of_step": round((fastest[f"{name} alone"] - plain) / fastest[f"{name} step"], 4),
                    "n": len(times["none step"]),
                    "note": options.note,
                }
            )
            print(rows[-1])
    print(f"appended to {append('augmentation', rows)}")


if __name__ == "__main__":
    main()
