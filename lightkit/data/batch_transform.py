"""The transforms of a data module, applied to a batch with random numbers that follow from the batch's number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightkit.data.augment import preset
from lightkit.errors import DataError


class BatchTransform:
    """Applies transforms one after the other, with torch's generators seeded.

    Args:
        transform: a word of `lightkit.data.augment.preset`, a callable of images, a list of these, or None for no
            transform.

    Raises:
        DataError: an entry is neither a known word nor a callable.
    """

    def __init__(self, transform: Any) -> None:
        listed = transform if isinstance(transform, (list, tuple)) else [transform]
        self.transforms = [entry for entry in listed if entry is not None]
        for entry in self.transforms:
            if isinstance(entry, str):
                preset(entry, channels=3)
            elif not callable(entry):
                raise DataError(f"transform must be light, strong or callables of images, got {entry!r}")

    def __bool__(self) -> bool:
        return bool(self.transforms)

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """Returns the transformed images.

        Args:
            images: floating point ``(N, C, H, W)``.
            seed: the seed of the generators of the CPU and of the images' device, whose states are restored.

        Raises:
            DataError: a transform returns anything else than a tensor of the same shape.
        """
        with _seeded(seed, images.device):
            for entry in self.transforms:
                changed = (preset(entry, images.shape[1]) if isinstance(entry, str) else entry)(images)
                if not isinstance(changed, Tensor) or changed.shape != images.shape:
                    got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                    raise DataError(f"transform must return images of shape {tuple(images.shape)}, got {got}")
                images = changed
        return images


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
