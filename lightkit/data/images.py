"""Classification of images that fit in memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, near_training, shard_kwargs
from lightkit.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels: uint8 ``(N, H, W)`` and int64 ``(N)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at the given indices."""
        return ImageSet(self.images[indices], self.labels[indices])

    def check(self, name: str, num_classes: int) -> ImageSet:
        """This set, or a `DataError` if images and labels do not fit together."""
        if len(self.images) != len(self.labels):
            raise DataError(f"{name}: {len(self.images)} images but {len(self.labels)} labels")
        if self.images.dim() != 3 or self.labels.dim() != 1:
            shapes = f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            raise DataError(f"{name}: expected images (N, H, W) and labels (N), got {shapes}")
        wrong = ((self.labels < 0) | (self.labels >= num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{name}: the label of image {row} is {int(self.labels[row])}, "
                f"but there are {num_classes} classes (0 to {num_classes - 1})"
            )
        return self


_LAYOUTS = ("image", "rows")


def to_input(images: Tensor) -> Tensor:
    """What a model is fed: uint8 ``(N, H, W)`` -> float32 ``(N, 1, H, W)`` in [0, 1]."""
    return images.unsqueeze(1).to(torch.float32).div_(255)


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices into two parts with the same mix of classes.

    Args:
        labels: ``(N)``, non-negative integers.
        size: of the second part.
        seed: the same seed gives the same split on every machine.

    Returns:
        Indices of the ``N - size`` and of the ``size`` samples, each ascending. Classes whose share is not a
        whole number are rounded so that the sizes are exact.
    """
    total = len(labels)
    if not 0 <= size < max(total, 1):
        raise ValueError(f"the size of a split of {total} samples must be from 0 to {total - 1}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator)
    # By class, in shuffled order within each: every (total / size)-th of them is an even share of each class.
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    positions = (torch.arange(size) * total + total // 2) // max(size, 1)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class[positions]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


class ImageDataModule(pl.LightningDataModule):
    """Serves grey images of one size from memory, as float32 in [0, 1] and int64 labels.

    Images stay uint8 until a batch is on its device. A subclass defines ``classes``, ``image_size`` and `read`.

    Args:
        batch_size: of training.
        eval_batch_size: of validation, test and prediction, where it changes nothing but speed.
        validation_size: samples taken from the training set for validation, stratified; 0 for none.
        seed: of the order of training. The split does not depend on it.
        layout: ``"image"`` serves ``(N, 1, H, W)``; ``"rows"`` serves each image as a sequence of its rows from top
            to bottom, ``(N, H, W)``.
    """

    # What the samples are called in the plural.
    unit = "images"

    classes: tuple[str, ...]
    image_size: int

    # Splits are part of a data set's definition: every run of it, whatever its seed, sees the same ones.
    split_seed = 0

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        validation_size: int = 0,
        seed: int = 0,
        layout: str = "image",
    ) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise DataError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_size = validation_size
        self.seed = seed
        self.layout = layout
        self.train: ImageSet | None = None
        self.validation: ImageSet | None = None
        self.test: ImageSet | None = None

    @abstractmethod
    def read(self) -> tuple[ImageSet, ImageSet]:
        """The training set and the test set."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data, once."""
        if self.train is not None:
            return
        name = type(self).__name__
        train, test = self.read()
        train.check(f"{name} training set", self.num_classes)
        self.test = test.check(f"{name} test set", self.num_classes)
        if not 0 <= self.validation_size < len(train):
            raise DataError(
                f"validation_size must be from 0 to {len(train) - 1} for the {len(train)} training images, "
                f"got {self.validation_size}"
            )
        rest, held_out = stratified_split(train.labels, self.validation_size, self.split_seed)
        self.train, self.validation = train.subset(rest), train.subset(held_out)

    def _batches(self, data: ImageSet, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return TensorBatches(
            near_training(self.trainer, (data.images, data.labels)),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )

    def train_dataloader(self) -> TensorBatches:
        """Shuffled batches of the training set."""
        return self._batches(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list:
        """Batches of the validation set, in order."""
        return self._batches(self.validation, self.eval_batch_size) if len(self.validation) else []

    def test_dataloader(self) -> TensorBatches:
        """Batches of the test set, in order."""
        return self._batches(self.test, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turns pixels into inputs, on the device of the batch."""
        images, labels = batch
        inputs = self.to_input(images)
        # Lightning has converted the batch to the precision of the training while it was still pixels.
        return inputs if self.trainer is None else self.trainer.precision_plugin.convert_input(inputs), labels

    def to_input(self, images: Tensor) -> Tensor:
        """What a model of this data is fed: uint8 ``(N, H, W)`` in the layout that was chosen."""
        inputs = to_input(images)
        return inputs.squeeze(1) if self.layout == "rows" else inputs
