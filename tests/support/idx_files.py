"""Folders of IDX files as those of MNIST."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def idx(values: Tensor) -> bytes:
    """Returns an IDX file of uint8 values of any shape."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes()


def write_idx_set(
    directory: Path,
    train: int = 20,
    test: int = 10,
    train_size: tuple[int, int] = (28, 28),
    test_size: tuple[int, int] | None = None,
) -> Path:
    """Writes the four files of a set of noise with the labels 0 to 9 in turn; returns ``directory``.

    Args:
        directory: is made if it does not exist.
        train: the number of training images.
        test: the number of test images.
        train_size: height and width of the training images.
        test_size: height and width of the test images; None for those of the training images.
    """
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count, size in (("train", train, train_size), ("t10k", test, test_size or train_size)):
        images = torch.randint(0, 256, (count, *size), generator=generator, dtype=torch.uint8)
        (directory / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((torch.arange(count) % 10).to(torch.uint8)))
    return directory
