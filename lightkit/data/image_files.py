"""Readers of image files, which convert them to the small images that a model takes."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightkit._util.printable import few
from lightkit._util.regular_files import kind_of_missing, open_regular, warn_of_skipped
from lightkit.data.image_decoder import FORMATS, decode, ignore_warnings_of_pillow
from lightkit.data.image_walk import walk_images, warn_of_others
from lightkit.errors import DataError

# A border whose mean is above this value is paper.
_BRIGHT = 127

# An image whose grey values differ by less than this is blank to a reader.
_FAINT = 16


@dataclass(frozen=True)
class ImageFormat:
    """The images into which files are converted.

    Args:
        size: height and width in pixels.
        channels: 1 for grey, 3 for red, green and blue.
        fit: what becomes of an image of another shape. ``"crop"`` scales it to cover ``size`` and cuts the rest off at
            both ends. ``"pad"`` scales it to fit into ``size``; the rest has the median of its border. ``"stretch"``
            scales both sides.
        invert: True inverts the image, False does not; ``"auto"`` inverts an image that does not have this size and
            whose border is bright on average.
    """

    size: tuple[int, int]
    channels: int = 1
    fit: str = "pad"
    invert: bool | Literal["auto"] = "auto"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image: ``(H, W)``, or ``(C, H, W)`` of several channels."""
        return self.size if self.channels == 1 else (self.channels, *self.size)


@dataclass(frozen=True)
class Picture:
    """An image of an `ImageFormat`.

    Attributes:
        path: the file.
        pixels: uint8 ``(H, W)``, or ``(3, H, W)`` in colour.
        source: the range of the values in the file if they have more than 8 bits, else "".
        is_first_of_several: True if the file has more frames or pages.
    """

    path: Path
    pixels: NDArray[np.uint8]
    source: str
    is_first_of_several: bool


def find_images(path: Path, may_be_empty: bool = False) -> list[Path]:
    """Returns ``path`` if it is a file, or the image files in it and in its subfolders, sorted by name, if a folder.

    The suffix decides, in capital or small letters: .png, .jpg, .tif, .webp, .bmp, .gif and their variants. Hidden
    entries and other files are left out, and one warning counts and names them.

    Args:
        path: the file or folder.
        may_be_empty: True returns an empty list for a folder without images.

    Raises:
        DataError: ``path`` does not exist or cannot be read, or the folder has no image.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return [path]
        if not stat.S_ISDIR(mode):
            # Raises an error that names the kind of file.
            open_regular(path, name=f"input={path}").close()
    except FileNotFoundError as error:
        raise DataError(f"input={path} does not exist{kind_of_missing(path)}") from error
    except OSError as error:
        raise DataError(f"input={path} cannot be read: {error.strerror or error}") from error
    walk = walk_images(path)
    if not walk.files and not may_be_empty:
        warn_of_skipped(walk.unreadable)
        others = f", only {few(walk.others)}" if walk.others else ""
        raise DataError(f"{path} holds no images ({FORMATS}){others}")
    warn_of_others(path, walk.others, walk.unreadable)
    return [file.path for file in walk.files]


def read_image(path: Path, size: int | tuple[int, int], invert: bool | Literal["auto"] = "auto") -> Tensor:
    """Reads an image of any size and depth as grey uint8 ``(H, W)``, light on dark.

    Args:
        path: a PNG, JPEG, TIFF, WebP, BMP or GIF file. The first frame or page of several is read. Values of 16 bits
            lose the lower 8; floating-point values must be from 0 to 1.
        size: height and width of the result; one number stands for both. The image is scaled to fit; if its shape is
            another, it is padded with the median of its border.
        invert: as in `ImageFormat`.

    Raises:
        DataError: Pillow is missing, or the file is no image that Pillow can read, or the image is too large, or its
            values are not of the range above.
    """
    shape = (size, size) if isinstance(size, int) else size
    _, pixels, _ = read_images([path], ImageFormat(shape, invert=invert))
    return pixels[0]


def read_images(paths: Sequence[Path], form: ImageFormat) -> tuple[list[Path], Tensor, dict[Path, DataError]]:
    """Reads image files, and skips those that cannot be read, so that the others are not lost.

    Args:
        paths: one file or more.
        form: the format of the images.

    Returns:
        The files that were read; their images, uint8 ``(N, H, W)`` or ``(N, C, H, W)``; and the error of each file
        that was skipped. `ImageReader.warn` tells of them.

    Raises:
        DataError: no file can be read; the message is that of the first.
    """
    reader = ImageReader(form)
    kept, images = reader.read(paths)
    reader.warn()
    return kept, images, reader.problems


class ImageReader:
    """Reads image files in parts, by several threads, and collects what is to be said of all of them.

    Args:
        form: the format of the images.

    Attributes:
        problems: the error of each file that was skipped.
    """

    def __init__(self, form: ImageFormat) -> None:
        self.problems: dict[Path, DataError] = {}
        self._form = form
        self._total = 0
        self._several: list[str] = []
        self._faint: list[str] = []

    def read(self, paths: Sequence[Path]) -> tuple[list[Path], Tensor]:
        """Returns those files that could be read, and their images, uint8 ``(N, H, W)`` or ``(N, C, H, W)``."""
        self._total += len(paths)
        with warnings.catch_warnings():
            ignore_warnings_of_pillow()
            if len(paths) > 1:
                with ThreadPoolExecutor(count_threads()) as pool:
                    results = list(pool.map(self._attempt, paths))
            else:
                results = [self._attempt(path) for path in paths]
        pictures = [picture for picture in results if isinstance(picture, Picture)]
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, DataError):
                self.problems[path] = result
        self._several += [str(picture.path) for picture in pictures if picture.is_first_of_several]
        self._faint += [_describe(picture) for picture in pictures if int(np.ptp(picture.pixels)) < _FAINT]
        pixels = np.stack([p.pixels for p in pictures]) if pictures else np.empty((0, *self._form.shape), np.uint8)
        return [picture.path for picture in pictures], torch.from_numpy(pixels)

    def _attempt(self, path: Path) -> Picture | DataError:
        try:
            return read_picture(path, self._form)
        except DataError as error:
            return error

    def warn(self) -> None:
        """Warns in one line each of the files that were skipped, of those with several frames, and of blank ones.

        Raises:
            DataError: no file could be read; the message is that of the first.
        """
        problems = list(self.problems.values())
        if len(problems) == self._total and problems:
            others = f"; and {len(problems) - 1} more cannot be read" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{others}") from problems[0]
        if problems:
            shown = few([str(problem) for problem in problems], separator="; ")
            warnings.warn(f"skipped {len(problems)} of {self._total} images: {shown}", stacklevel=3)
        if self._several:
            count, shown = _count(self._several), few(self._several)
            warnings.warn(f"the first frame or page is read of {count} with several: {shown}", stacklevel=3)
        if self._faint:
            warnings.warn(
                f"{_count(self._faint)} blank or nearly so, with grey values that differ by less than {_FAINT} of 255: "
                f"{few(self._faint)}",
                stacklevel=3,
            )


def count_threads() -> int:
    """Returns the number of processors that this process may use: Pillow decodes without Python's lock."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(images: Sequence[str]) -> str:
    return "1 image" if len(images) == 1 else f"{len(images)} images"


def _describe(picture: Picture) -> str:
    return f"{picture.path} ({picture.source})" if picture.source else str(picture.path)


def read_picture(path: Path, form: ImageFormat) -> Picture:
    """Reads an image file, and converts the image to a format.

    Threads may call the function at the same time; their starter calls `ignore_warnings_of_pillow`.

    Raises:
        DataError: as in `read_image`.
    """
    decoded = decode(path, form.size, form.channels)
    return Picture(path, to_format(decoded.pixels, form), decoded.source, decoded.is_first_of_several)


def to_format(pixels: NDArray[np.uint8], form: ImageFormat) -> NDArray[np.uint8]:
    """Converts the pixels of an image of any size to a format.

    Args:
        pixels: uint8 ``(H, W)`` in grey, ``(H, W, 3)`` in colour, as the channels of ``form``.
        form: the format.

    Returns:
        The pixels, uint8 of the shape of ``form``, contiguous.
    """
    is_other = pixels.shape[:2] != form.size
    needs_border = (form.invert == "auto" or form.fit == "pad") and is_other
    border = _border(pixels) if needs_border else np.zeros(1)
    if form.invert is True or (form.invert == "auto" and is_other and border.mean() > _BRIGHT):
        pixels, border = 255 - pixels, 255 - border
    if is_other:
        pixels = _FITS[form.fit](pixels, form.size, np.median(border, axis=0).astype(np.uint8))
    if form.channels == 3:
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _pad(pixels: NDArray[np.uint8], size: tuple[int, int], ground: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scales an image to fit into ``size``, height and width, in the middle of the value ``ground``."""
    (height, width), (most_high, most_wide) = pixels.shape[:2], size
    if width * most_high > height * most_wide:
        high, wide = max(1, round(height / width * most_wide)), most_wide
    else:
        high, wide = most_high, max(1, round(width / height * most_high))
    result = np.empty((*size, *pixels.shape[2:]), np.uint8)
    result[:] = ground
    top, left = round((most_high - high) / 2), round((most_wide - wide) / 2)
    result[top : top + high, left : left + wide] = _scale(pixels, (high, wide))
    return result


def _crop(pixels: NDArray[np.uint8], size: tuple[int, int], ground: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cuts the largest part of the shape of ``size`` out of the middle of an image, and scales it."""
    (height, width), (high, wide) = pixels.shape[:2], size
    if width * high > height * wide:
        kept = height, max(1, round(height * wide / high))
    else:
        kept = max(1, round(width * high / wide)), width
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    return _scale(pixels[top : top + kept[0], left : left + kept[1]], size)


def _stretch(pixels: NDArray[np.uint8], size: tuple[int, int], ground: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _scale(pixels, size)


_FITS = {"crop": _crop, "pad": _pad, "stretch": _stretch}

# The names of the ways to fit an image into another shape.
FITS = tuple(_FITS)


def _scale(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    height, width = size
    scaled = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(scaled)
