"""A base class for data modules of labelled images in memory, grey or in colour."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.batch_transform import BatchTransform
from lightkit.data.batches import Batches, after_setup, batches_for, check_positive
from lightkit.data.folds import Fold, Foldable
from lightkit.data.image_files import ImageFormat
from lightkit.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels.

    Attributes:
        images: uint8 ``(N, H, W)`` for grey images, ``(N, C, H, W)`` for images of C channels.
        labels: int64 ``(N)``.
    """

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
            DataError: the numbers of images and labels differ, the images are neither ``(N, H, W)`` nor
                ``(N, C, H, W)``, the labels are not ``(N)``, or a label is out of range; for a label the message names
                the first such image.
        """
        if len(self.images) != len(self.labels):
            raise DataError(f"{name}: {len(self.images)} images but {len(self.labels)} labels")
        if self.images.dim() not in (3, 4) or self.labels.dim() != 1:
            shapes = f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            raise DataError(f"{name}: expected images (N, H, W) or (N, C, H, W) and labels (N), got {shapes}")
        wrong = ((self.labels < 0) | (self.labels >= num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{name}: the label of image {row} is {int(self.labels[row])}, "
                f"but there are {num_classes} classes (0 to {num_classes - 1})"
            )
        return self


def check_same_size(name: str, train: Sequence[int], test: Sequence[int]) -> None:
    """Rejects a training set and a test set whose images have different sizes.

    Args:
        name: the name of the data in the message.
        train: height and width of the training images in pixels.
        test: height and width of the test images in pixels.

    Raises:
        DataError: the sizes differ; the message has both.
    """
    if tuple(train) != tuple(test):
        sizes = [f"{height} x {width}" for height, width in (train, test)]
        raise DataError(f"{name}: the training images are {sizes[0]} pixels and the test images {sizes[1]}")


_LAYOUTS = ("image", "rows")


def to_input(images: Tensor) -> Tensor:
    """Converts uint8 images to the input of a model, float32 in [0, 1].

    Args:
        images: ``(N, H, W)``, of which the function makes ``(N, 1, H, W)``, or ``(N, C, H, W)``.
    """
    images = images.unsqueeze(1) if images.dim() == 3 else images
    return images.to(torch.float32).div_(255)


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


class ImageDataModule(Foldable, pl.LightningDataModule):
    """A base class for data modules of images of one size: float32 in [0, 1], with int64 labels ``(N)``.

    Images stay uint8 until a batch is on its device. A subclass defines ``classes`` (the names of the classes),
    ``image_size`` (height and width in pixels, or one number for both, unless its data have another size),
    ``channels`` (3 for images in colour) and `read`. A checkpoint of Lightning keeps the size of the images,
    `state_dict`.

    Args:
        batch_size: the number of samples in a batch of training.
        eval_batch_size: the number of samples in a batch of validation and test; it changes the speed only.
        validation_size: the number of training samples that are held out for validation, with the same mix of classes;
            0 holds out none. `with_fold` holds out a fold instead.
        seed: the seed of the order of the training batches. The split does not depend on it.
        layout: ``"image"`` serves ``(N, C, H, W)``; ``"rows"`` serves each image as a sequence of its rows from top
            to bottom, ``(N, H, C * W)``: of each row first all values of the first channel.
        transform: random changes of the batches of training: ``"light"`` or ``"strong"``, see
            `lightkit.data.augment.preset`; a callable of images ``(N, C, H, W)`` in [0, 1], such as a class of
            `lightkit.data.augment`; a list of these; or None. For each batch torch's generators get a seed that
            follows from ``seed``, the rank, the epoch and the number of the batch, and then their state before.

    Raises:
        DataError: an argument is out of its range, or `setup` reads an invalid data set.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
    unit = "images"

    classes: tuple[str, ...]
    image_size: int | tuple[int, int]
    channels: int = 1

    # The split is part of the data set: it is the same for every seed of a run.
    split_seed = 0

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        validation_size: int = 0,
        seed: int = 0,
        layout: str = "image",
        transform: Any = None,
    ) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise DataError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_size = validation_size
        self.seed = seed
        self.layout = layout
        self.transform = BatchTransform(transform)
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

    def image_shape(self) -> tuple[int, int]:
        """Returns height and width of the images in pixels: before `setup` the expected ones, then the data's."""
        if self.train is None:
            return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        height, width = self.train.images.shape[-2:]
        return height, width

    def image_format(self) -> ImageFormat:
        """Returns the format into which predictions convert image files.

        Grey images are padded, and inverted where they are dark on bright, as the MNIST family is bright on dark;
        images in colour are cropped.
        """
        # A subclass may read the headers of files for its `image_shape`, and a prediction must not need the data.
        size = ImageDataModule.image_shape(self)
        return ImageFormat(size) if self.channels == 1 else ImageFormat(size, self.channels, fit="crop", invert=False)

    def stored_shape(self) -> tuple[int, ...]:
        """Returns the shape of an image as `ImageSet` stores it, ``(H, W)`` or ``(C, H, W)``; see `image_shape`."""
        if self.train is not None:
            return tuple(self.train.images.shape[1:])
        return self.image_shape() if self.channels == 1 else (self.channels, *self.image_shape())

    def model_sizes(self) -> dict[str, Any]:
        """Returns the sizes of a model for these images, by the name of its argument: see `lightkit.data.sizes_of`.

        ``num_classes`` and ``num_outputs`` are the number of classes, and ``input_size`` is the number of values in a
        row. The layout of images has ``in_channels`` and ``image_size`` too, the latter one number or a list of height
        and width.
        """
        served = self.to_input(torch.empty(1, *self.stored_shape(), dtype=torch.uint8)).shape[1:]
        sizes: dict[str, Any] = {"num_classes": self.num_classes, "num_outputs": self.num_classes}
        sizes["input_size"] = served[-1]
        if len(served) != 3:
            return sizes
        channels, height, width = served
        return {**sizes, "in_channels": channels, "image_size": height if height == width else [height, width]}

    def state_dict(self) -> dict[str, Any]:
        """Returns ``image_shape``, height and width of the images, which a checkpoint keeps for later predictions."""
        return {"image_shape": list(self.image_shape())}

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, and splits the training set; a second call does nothing."""
        if self.train is not None:
            return
        name = type(self).__name__
        train, test = self.read()
        train.check(f"{name} training set", self.num_classes)
        self.test = test.check(f"{name} test set", self.num_classes)
        check_same_size(name, train.images.shape[-2:], test.images.shape[-2:])
        rest, held_out = self._split(train.labels)
        self.train, self.validation = train.subset(rest), train.subset(held_out)

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices of the images for training and of those for validation."""
        if self.fold is not None:
            return self.fold.split(labels, self.split_seed)
        if not 0 <= self.validation_size < len(labels):
            raise DataError(
                f"validation_size must be from 0 to {len(labels) - 1} for the {len(labels)} training images, "
                f"got {self.validation_size}"
            )
        return stratified_split(labels, self.validation_size, self.split_seed)

    def _begin_fold(self, fold: Fold) -> None:
        self.train = self.validation = self.test = None

    def _batches(self, data: ImageSet, batch_size: int, shuffle: bool = False) -> Batches:
        tensors = (data.images, data.labels)
        return batches_for(self.trainer, tensors, batch_size, shuffle=shuffle, seed=self.seed)

    def train_dataloader(self) -> Batches:
        """Returns shuffled batches of the training set."""
        batches = self._batches(after_setup(self.train), self.batch_size, shuffle=True)
        # The draws of a batch follow from its number; validation and test have no numbers, and are not changed.
        batches.is_numbered = bool(self.transform)
        return batches

    def val_dataloader(self) -> Batches | list[Tensor]:
        """Returns batches of the validation set in order; an empty list if there is no validation set."""
        validation = after_setup(self.validation)
        return self._batches(validation, self.eval_batch_size) if len(validation) else []

    def test_dataloader(self) -> Batches:
        """Returns batches of the test set in order."""
        return self._batches(after_setup(self.test), self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Any, ...], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Converts the images of a batch by `to_input` on their device; returns inputs and labels.

        Of a batch of training, which has a `lightkit.data.batches.BatchNumber` as its third entry, the images are
        changed by ``transform``.
        """
        images, labels, *number = batch
        inputs = self.to_input(images)
        if number:
            inputs = self._change(inputs, number[0].seed(self.seed))
        # Lightning converted the batch to the precision of the training when it was still uint8.
        return inputs if self.trainer is None else self.trainer.precision_plugin.convert_input(inputs), labels

    def _change(self, inputs: Tensor, seed: int) -> Tensor:
        """Returns the inputs after the transforms, which take images, whatever the layout is."""
        if self.layout != "rows" or inputs.dim() != 3:
            return self.transform(inputs, seed)
        images = inputs.unflatten(2, (self.channels, -1)).transpose(1, 2)
        return self.transform(images, seed).transpose(1, 2).flatten(2)

    def to_input(self, images: Tensor) -> Tensor:
        """Converts uint8 images to the input of a model, float32 in [0, 1] in the shape of ``layout``.

        Args:
            images: ``(N, H, W)`` or ``(N, C, H, W)``.
        """
        inputs = to_input(images)
        return inputs.transpose(1, 2).flatten(2) if self.layout == "rows" else inputs
