"""Folders of images, and lists of image files, as the samples of `lightkit.fit` and of its result."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightkit._util.printable import few, printable
from lightkit.data import ImageDataModule, ImageFolder, ImageSet, TensorBatches
from lightkit.data.batches import Batches
from lightkit.data.image_files import ImageFormat, ImageReader, find_images
from lightkit.data.image_folder import load_files
from lightkit.data.image_stream import StreamedBatches, StreamedImages
from lightkit.data.image_tree import read_tree
from lightkit.errors import ConfigError, DataError
from lightkit.fitting.samples import probe
from lightkit.fitting.tables import SUFFIXES
from lightkit.models import LanguageModel

# The number of bytes of decoded images up to which an evaluation holds them in memory.
_MEMORY_LIMIT = 2_000_000_000

# A longer text is no path.
_MAX_PATH = 4096


def is_folder(x: Any) -> bool:
    """Returns True for the path of an existing folder, a text or a path."""
    return isinstance(x, (str, os.PathLike)) and os.path.isdir(os.path.expanduser(x))


def are_files(x: Any) -> bool:
    """Returns True for a path, and for a list or tuple of paths: texts, or paths of pathlib."""
    if isinstance(x, (list, tuple)):
        return all(isinstance(path, (str, os.PathLike)) for path in x)
    return isinstance(x, (str, os.PathLike))


def check_path(model: Any, x: Any) -> None:
    """Rejects a path without ``y`` that is no folder: a missing one, or a file that is no table by its name.

    Args:
        model: the model, or the name of one. A model of a language learns a text, which may look like a path.
        x: the samples, of any kind.

    Raises:
        ConfigError: the message says what was expected.
    """
    if not isinstance(x, (str, os.PathLike)) or os.fspath(x).lower().endswith(SUFFIXES):
        return
    is_text = isinstance(x, str) and (isinstance(model, (pl.LightningModule, LanguageModel)) or "\n" in x)
    if os.path.isfile(os.path.expanduser(x)):
        problem = "is a file"
    elif is_text or len(os.fspath(x)) > _MAX_PATH:
        return
    else:
        problem = "does not exist"
    expected = "a folder of images with a folder for each class, or a table and y, the name of its column"
    if isinstance(x, str):
        expected += "; a text without labels takes a lightkit.models.LanguageModel, such as RNNLanguageModel"
    if is_text:
        expected = "the text itself, such as pathlib.Path(x).read_text()"
    raise ConfigError(f"x={printable(os.fspath(x))} {problem}: expected {expected}")


def make_folder(model: Any, x: Any, y: Any, validation: Any, batch_size: int, seed: int) -> ImageFolder:
    """Returns the data module of a folder of images, with its images for training and validation.

    The images get one channel or three as the files have them, unless only the other number fits the model. Without a
    test set, the images for validation are the test set, too.

    Args:
        model: the model, or the name of one.
        x: the folder: see `lightkit.data.ImageFolder`.
        y: None.
        validation: the share of the images for a validation set that has no folder, 0 for no validation, or a folder
            with the classes of ``x``.
        batch_size: the number of images in a batch of training.
        seed: the seed of the order of the training batches.

    Raises:
        LightkitError: an argument does not fit, the folder has no two classes, or the model does not take its images.
    """
    path = os.fspath(x)
    if y is not None:
        raise ConfigError(f"y must be None for the folder x={path}, whose folders are the classes, got {_kind(y)}")
    other = validation if is_folder(validation) else None
    is_share = not isinstance(validation, bool) and isinstance(validation, (int, float)) and 0 <= validation < 1
    if other is None and not is_share:
        raise ConfigError(
            "validation must be a share from 0 to below 1, or a folder with the classes of x, got "
            f"{printable(repr(validation))[:100]}"
        )
    share = 0 if other is not None else validation
    options = {"validation_share": share, "test_share": 0, "batch_size": batch_size, "seed": seed}
    data = _with_channels_of(model, path, options)
    # A set that is there already is not read from the folder.
    if other is not None:
        data.validation = _labelled_images(other, data, data.image_format(), "validation")
    elif share == 0:
        nothing = torch.empty(0, *data.stored_shape(), dtype=torch.uint8)
        data.validation = ImageSet(nothing, torch.empty(0, dtype=torch.long))
    data.setup("fit")
    if "test" in data.split_sets:
        data.test = data.validation
        if share and "validation" in data.split_sets:
            # A later evaluation of the folder then takes the images that were held out.
            data.validation_share, data.test_share = 0, share
    return data


def labelled_batches(x: Any, data: ImageDataModule, form: ImageFormat, batch_size: int) -> Batches:
    """Returns the images of another folder and their classes in batches: those of its test set if it has sets.

    Args:
        x: the folder, with a folder for each class, or with the sets of `lightkit.data.ImageFolder`.
        data: the data module of the training, which has the names of the classes.
        form: the format of the images.
        batch_size: the number of images in a batch.

    Raises:
        LightkitError: the folder has no image of a class that can be read.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    found = _labelled_images(x, data, form, "x")
    images: Any = found.images
    if isinstance(images, StreamedImages):
        return StreamedBatches(images, found.labels, batch_size)
    return TensorBatches((images, found.labels), batch_size)


def file_batches(x: Any, form: ImageFormat, batch_size: int) -> Iterator[Tensor]:
    """Yields the images of files, uint8 ``(N, H, W)`` or ``(N, C, H, W)``, in the order of the files.

    Args:
        x: an image file; a folder, of which all images below it are taken, sorted by name; or a list of both.
        form: the format of the images.
        batch_size: the number of images in a batch.

    Raises:
        LightkitError: a path does not exist, a folder has no image, or a file cannot be read.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    listed = [Path(path).expanduser() for path in (x if isinstance(x, (list, tuple)) else [x])]
    if not listed:
        raise DataError("x must have at least one image file, got an empty list")
    if missing := [str(path) for path in listed if not path.exists()]:
        raise DataError(f"x has files that do not exist: {few(missing)}")
    paths = [file for path in listed for file in find_images(path)]
    for begin in range(0, len(paths), batch_size):
        reader = ImageReader(form)
        _, images = reader.read(paths[begin : begin + batch_size])
        if reader.problems:
            # A file that is left out would shift the predictions of those after it.
            reasons = few([str(problem) for problem in reader.problems.values()], separator="; ")
            raise DataError(f"x has images that cannot be read: {reasons}")
        yield images


def _with_channels_of(model: Any, path: str, options: dict[str, Any]) -> ImageFolder:
    """Returns the data module with the number of channels that a model takes, the files' own if it takes both."""
    found = ImageFolder(path, **options)
    if not isinstance(model, nn.Module):
        return found
    problems = []
    for channels in (found.channels, 3 if found.channels == 1 else 1):
        data = ImageFolder(path, channels=channels, **options)
        inputs = data.to_input(torch.zeros(2, *data.stored_shape(), dtype=torch.uint8))
        try:
            probe(model, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problems.append(f"as {tuple(inputs.shape)}: {str(error).strip().partition(chr(10))[0]}")
        else:
            return data
    if isinstance(model, pl.LightningModule):
        # Its training step may do without a forward.
        return found
    raise ConfigError(
        f"the model does not take the images of {printable(path)}: {'; '.join(problems)}; "
        "x=lightkit.data.ImageFolder(path, image_size=...) gives them another size"
    )


def _labelled_images(x: Any, data: ImageDataModule, form: ImageFormat, argument: str) -> ImageSet:
    """Returns the images of a folder and their classes; of a folder with sets, those of its test set."""
    if not is_folder(x):
        raise DataError(f"{argument}={printable(str(x))} must be a folder with a folder for each class")
    tree = read_tree(Path(x).expanduser(), 0, 0, data.classes)
    has_sets = len(tree.split) < 2
    files = tree.sets["test"] if has_sets else tree.sets["train"]
    if not files:
        place = " in a test set" if has_sets else ""
        raise DataError(f"{argument}={printable(str(x))} has no images of the classes {few(data.classes)}{place}")
    found, problems = load_files(files, form, _MEMORY_LIMIT)
    if len(found) == 0:
        raise DataError(f"{argument}={printable(str(x))}: none of the {len(files)} images can be read: {problems[0]}")
    if problems:
        shown = few(problems, separator="; ")
        warnings.warn(f"{printable(str(x))}: skipped {len(problems)} of {len(files)} images: {shown}", stacklevel=2)
    return found


def _kind(value: Any) -> str:
    return f"the text {printable(value)!r}" if isinstance(value, str) else type(value).__name__
