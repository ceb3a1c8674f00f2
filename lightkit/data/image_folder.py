"""A data module of a folder of images, in which each class has a folder."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit._util.printable import few, printable
from lightkit.data.batches import Batches, shard_kwargs
from lightkit.data.image_files import FITS, ImageFormat
from lightkit.data.image_store import decode_files, read_headers
from lightkit.data.image_stream import StreamedBatches, StreamedImages
from lightkit.data.image_tree import SETS, ImageTree, LabelledFile, read_tree
from lightkit.data.images import ImageDataModule, ImageSet
from lightkit.errors import DataError

# The sides of the square that images of several sizes get. Images of one size keep it between the first and the last:
# lightkit.models.CNN takes no images below 18 pixels.
_SQUARES = (32, 64, 128)
_MIN_SIDE, _MAX_SIDE = 18, 128

_MAX_IMAGE_SIZE = 4096


class ImageFolder(ImageDataModule):
    """A data module of a folder of images: a folder for each class, with or without folders for the three sets.

    ``path`` has a folder for each class, in any depth; or the folders ``train``, ``val`` (or ``valid``,
    ``validation``) and ``test``, each with a folder for each class. Sets without a folder are split off the training
    set: see `lightkit.data.image_tree.read_tree`. Files may be PNG, JPEG, TIFF, WebP, BMP or GIF, of any size, depth
    and orientation. Other files and damaged ones are skipped, and one line counts them.

    The images are decoded once, by several threads, and kept in the cache directory, as long as no file changes. If
    those of a set take more than ``memory_limit`` bytes, each is decoded anew in each epoch.

    Args:
        path: the folder.
        image_size: height and width of the images in pixels, or one number for both. None takes the size of the files
            if it is the same for all, with sides from 18 to 128; else a square of 32, 64 or 128 pixels, the largest
            that is not larger than half of the files.
        channels: 1 for grey images, 3 for images in colour; None takes 1 if all files are grey by their format.
        fit: what becomes of an image of another shape: ``"crop"``, ``"pad"`` or ``"stretch"``, see
            `lightkit.data.image_files.ImageFormat`.
        classes: the names of the classes in the order of their indices; None takes the names of all folders, sorted.
        validation_share: the share of the training images for validation, from 0 to below 1, if the folder has no
            validation set.
        test_share: the share of the training images for the test, if the folder has no test set.
        memory_limit: the number of bytes up to which the decoded images of a set are held in memory.
        batch_size: as in `ImageDataModule`.
        eval_batch_size: as in `ImageDataModule`.
        seed: as in `ImageDataModule`.
        layout: as in `ImageDataModule`.
        transform: as in `ImageDataModule`.

    Raises:
        DataError: an argument is out of its range. `setup`, or a question for a size that was None: the folder cannot
            be read, has fewer than two classes, or a class whose files are all damaged.
    """

    def __init__(
        self,
        path: str,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        fit: str = "crop",
        classes: Sequence[str] | None = None,
        validation_share: float = 0.15,
        test_share: float = 0.15,
        memory_limit: int = 2_000_000_000,
        batch_size: int = 32,
        eval_batch_size: int = 100,
        seed: int = 0,
        layout: str = "image",
        transform: Any = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, layout=layout, transform=transform
        )
        if channels not in (None, 1, 3):
            raise DataError(f"channels must be 1 (grey), 3 (colour) or null, got {channels}")
        if fit not in FITS:
            raise DataError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        shares = {"validation_share": validation_share, "test_share": test_share}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise DataError(f"{name} must be at least 0 and below 1, got {share}")
        if sum(shares.values()) >= 1:
            raise DataError(f"validation_share and test_share together must be below 1, got {sum(shares.values()):g}")
        self.path = path
        self.fit = fit
        self.validation_share = validation_share
        self.test_share = test_share
        self.memory_limit = memory_limit
        self._given_size = None if image_size is None else _checked_size(image_size)
        self._given_channels = channels
        self._given_classes = None if classes is None else _checked_classes(classes)
        self._tree: ImageTree | None = None
        self._found: tuple[tuple[int, int], int] | None = None

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the classes, which are those of the folders."""
        return self._read_tree().classes if self._given_classes is None else self._given_classes

    @property
    def image_size(self) -> tuple[int, int]:  # type: ignore[override]
        """Height and width of the images in pixels."""
        return self._find_format()[0] if self._given_size is None else self._given_size

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Returns 1 for grey images and 3 for images in colour."""
        return self._find_format()[1] if self._given_channels is None else self._given_channels

    @property
    def split_sets(self) -> tuple[str, ...]:
        """Names the sets, of ``test`` and ``validation``, that have no folder and are split off the training set."""
        return tuple(self._read_tree().split)

    @property
    def is_described(self) -> bool:
        """True if size, channels and classes are arguments, so that the folder need not be read for them."""
        return None not in (self._given_size, self._given_channels, self._given_classes)

    def image_shape(self) -> tuple[int, int]:
        """Returns height and width of the images in pixels."""
        return self.image_size

    def stored_shape(self) -> tuple[int, ...]:
        """Returns the shape of an image, ``(H, W)`` or ``(3, H, W)``."""
        return self.image_format().shape

    def image_format(self) -> ImageFormat:
        """Returns the format into which files are converted, for the training and for predictions."""
        return ImageFormat(self.image_size, self.channels, self.fit, invert=False)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The arguments from which a checkpoint builds a data module of such images, as plain containers."""
        shares = {"validation_share": self.validation_share, "test_share": self.test_share}
        return {"path": self.path, "fit": self.fit, "layout": self.layout, **shares, **self.found_arguments()}

    def found_arguments(self) -> dict[str, Any]:
        """Returns the arguments that the folder decides where they are None: size, channels and classes.

        The record of a run has them, so that a checkpoint predicts without the folder.
        """
        height, width = self.image_size
        size = height if height == width else [height, width]
        return {"image_size": size, "channels": self.channels, "classes": list(self.classes)}

    def _read_tree(self) -> ImageTree:
        if self._tree is None:
            root = Path(self.path).expanduser()
            self._tree = read_tree(root, self.validation_share, self.test_share, self._given_classes)
        return self._tree

    def _find_format(self) -> tuple[tuple[int, int], int]:
        """Returns the size and the number of channels that the files decide, and prints what they are."""
        if self._found is not None:
            return self._found
        files = [labelled.file for part in self._read_tree().sets.values() for labelled in part]
        headers = read_headers(files)
        if not headers:
            raise DataError(f"{printable(self.path)}: none of the {len(files)} images can be read")
        channels = 1 if all(header.is_grey for header in headers) else 3
        sizes = {(header.height, header.width) for header in headers}
        shorter = statistics.median_low(min(header.height, header.width) for header in headers)
        (size, *others) = sizes
        if others or not (_MIN_SIDE <= min(size) and max(size) <= _MAX_SIDE):
            side = max((side for side in _SQUARES if side <= shorter), default=_SQUARES[0])
            size = (side, side)
        self._found = size, channels
        return self._found

    def prepare_data(self) -> None:
        """Decodes the images for the cache, if several processes will read it."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self._load_for("test" if self.trainer.testing else "fit")

    def setup(self, stage: str | None = None) -> None:
        """Reads the images of a stage: ``fit`` and ``validate`` need no test set, ``test`` needs nothing else."""
        self._load_for(stage)

    def _files_of_sets(self) -> dict[str, list[LabelledFile]]:
        """Returns the files of each set; a fold of a cross-validation takes the place of the validation set."""
        sets = self._read_tree().sets
        if self.fold is None:
            return sets
        files = sorted(sets["train"] + sets["validation"], key=lambda file: (file.label, file.file.name))
        labels = torch.tensor([file.label for file in files], dtype=torch.int64)
        parts = dict(zip(("train", "validation"), self.fold.split(labels, self.split_seed), strict=True))
        return {**sets, **{name: [files[index] for index in part.tolist()] for name, part in parts.items()}}

    def _load_for(self, stage: str | None) -> None:
        names = SETS if stage is None else ("test",) if stage == "test" else ("train", "validation")
        missing = [name for name in names if getattr(self, name) is None]
        if not missing:
            return
        sets = self._files_of_sets()
        if "train" in missing and not sets["train"]:
            raise DataError(f"{printable(self.path)} has no training images")
        loaded = {name: load_files(sets[name], self.image_format(), self.memory_limit) for name in missing}
        _warn_of_damaged(self.path, [problem for _, problems in loaded.values() for problem in problems])
        for name, (images, _) in loaded.items():
            setattr(self, name, images)
        if "train" in missing:
            self._check_training_set()
            self._describe(sets)

    def _check_training_set(self) -> None:
        assert self.train is not None
        counts = self.train.labels.bincount(minlength=len(self.classes)).tolist()
        lost = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if lost:
            raise DataError(f"{printable(self.path)}: no training image of {few(lost)} can be read")

    @rank_zero_only
    def _describe(self, sets: dict[str, list[LabelledFile]]) -> None:
        tree = self._read_tree()
        shares = {"validation": self.validation_share, "test": self.test_share}
        split = [name for name in tree.split if shares[name] > 0]
        shown = [name for name in SETS if name not in tree.split or name in split]
        loaded: dict[str, ImageSet | None] = {name: getattr(self, name) for name in shown}
        counts = [f"{len(sets[name] if part is None else part):,} {name}" for name, part in loaded.items()]
        form = self.image_format()
        colour = "grey" if form.channels == 1 else "in colour"
        way = f", {' and '.join(sorted(split))} split off by the names of the files" if split else ""
        print(
            f"{printable(self.path)}: {len(tree.classes)} classes ({few(tree.classes)}), {', '.join(counts)} images of "
            f"{form.size[0]} x {form.size[1]} pixels {colour}{way}",
            flush=True,
        )

    def _batches(self, data: ImageSet, batch_size: int, shuffle: bool = False) -> Batches:
        images = cast(Any, data.images)
        if not isinstance(images, StreamedImages):
            return super()._batches(data, batch_size, shuffle)
        shard = shard_kwargs(self.trainer, training=shuffle)
        return StreamedBatches(images, data.labels, batch_size, shuffle=shuffle, seed=self.seed, **shard)


def load_files(files: Sequence[LabelledFile], form: ImageFormat, memory_limit: int) -> tuple[ImageSet, list[str]]:
    """Returns the images of those files that can be read, and what is wrong with each other file.

    Args:
        files: the files with their classes.
        form: the format of the images.
        memory_limit: the number of bytes up to which the decoded images are held in memory; more of them are
            `lightkit.data.image_stream.StreamedImages`.
    """
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    fits = len(files) * form.channels * form.size[0] * form.size[1] <= memory_limit
    decoded = decode_files([file.file for file in files], form, keeps_pixels=fits)
    images: Any = decoded.images
    if images is None:
        images = StreamedImages([files[index].file for index in decoded.kept], form)
    return ImageSet(images, labels[decoded.kept]), decoded.problems


def _checked_size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= _MAX_IMAGE_SIZE for side in sides):
        raise DataError(
            f"image_size must be a number of pixels up to {_MAX_IMAGE_SIZE}, or height and width, got {size!r}"
        )
    return sides[0], sides[1]


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    names = list(classes) if isinstance(classes, (list, tuple)) else []
    if not names or len(set(map(str, names))) < len(names):
        raise DataError(f"classes must be different names of folders, got {classes!r}")
    return tuple(map(str, names))


def _warn_of_damaged(path: str, problems: list[str]) -> None:
    if problems:
        count = "1 image" if len(problems) == 1 else f"{len(problems)} images"
        warnings.warn(f"{printable(path)}: skipped {count}: {few(problems, separator='; ')}", stacklevel=3)
