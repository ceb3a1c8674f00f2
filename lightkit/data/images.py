"""A base class for data modules of labelled grey images in memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, after_setup, shard_kwargs, to_training_device
from lightkit.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 ``(N, H, W)``, and their labels, int64 ``(N)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """Returns the images and labels at ``indices``, int64 ``(M)``."""
        return ImageSet(self.images[indices], self.labels[indices])

    def check(self, name: str, num_classes: int) -> ImageSet:
        """Returns this set if its shapes and labels are valid.

        Args:
            name: the name of the set in the message of an error.
            num_classes: the number of classes; the labels must be from 0 to ``num_classes - 1``.

        Raises:
            DataError: the numbers of images and labels differ, the images are not ``(N, H, W)``, the labels are not
                ``(N)``, or a label is out of range; for a label the message names the first such image.
        """
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
    """Converts uint8 ``(N, H, W)`` to the input of a model, float32 ``(N, 1, H, W)`` in [0, 1]."""
    return images.unsqueeze(1).to(torch.float32).div_(255)


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices into two parts with the same mix of classes.

    Args:
        labels: the classes of the samples, non-negative integers ``(N)``.
        size: the number of samples in the second part.
        seed: the seed of the split; a seed gives the same split on every machine.

    Returns:
        The indices of the first part, int64 ``(N - size)``, and of the second part, int64 ``(size)``, each ascending.
        The number of samples of a class in the second part is its share, rounded.

    Raises:
        ValueError: ``size`` is negative or not below N.
    """
    total = len(labels)
    if not 0 <= size < max(total, 1):
        raise ValueError(f"the size of a split of {total} samples must be from 0 to {total - 1}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator)
    # Sorted by class and shuffled within a class: every (total / size)-th sample makes an even share of each class.
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    positions = (torch.arange(size) * total + total // 2) // max(size, 1)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class[positions]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


class ImageDataModule(pl.LightningDataModule):
    """A base class for data modules of grey images of one size: float32 in [0, 1], with int64 labels ``(N)``.

    Images stay uint8 until a batch is on its device. A subclass defines ``classes`` (the names of the classes),
    ``image_size`` (height and width in pixels) and `read`.

    Args:
        batch_size: the number of samples in a batch of training.
        eval_batch_size: the number of samples in a batch of validation and test; it changes the speed only.
        validation_size: the number of training samples that are held out for validation, with the same mix of classes;
            0 holds out none.
        seed: the seed of the order of the training batches. The split does not depend on it.
        layout: ``"image"`` serves ``(N, 1, H, W)``; ``"rows"`` serves each image as a sequence of its rows from top
            to bottom, ``(N, H, W)``.

    Raises:
        DataError: an argument is out of its range, or `setup` reads an invalid data set.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
    unit = "images"

    classes: tuple[str, ...]
    image_size: int

    # The split is part of the data set: it is the same for every seed of a run.
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
        """Reads the training set and the test set."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, and splits the training set; a second call does nothing."""
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
            to_training_device(self.trainer, (data.images, data.labels)),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )

    def train_dataloader(self) -> TensorBatches:
        """Returns shuffled batches of the training set."""
        return self._batches(after_setup(self.train), self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list[Tensor]:
        """Returns batches of the validation set in order; an empty list if there is no validation set."""
        validation = after_setup(self.validation)
        return self._batches(validation, self.eval_batch_size) if len(validation) else []

    def test_dataloader(self) -> TensorBatches:
        """Returns batches of the test set in order."""
        return self._batches(after_setup(self.test), self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Converts the images of a batch by `to_input` on their device; returns inputs and labels."""
        images, labels = batch
        inputs = self.to_input(images)
        # Lightning converted the batch to the precision of the training when it was still uint8.
        return inputs if self.trainer is None else self.trainer.precision_plugin.convert_input(inputs), labels

    def to_input(self, images: Tensor) -> Tensor:
        """Converts uint8 ``(N, H, W)`` to the input of a model, float32 in [0, 1] in the shape of ``layout``."""
        inputs = to_input(images)
        return inputs.squeeze(1) if self.layout == "rows" else inputs
