"""The images of a set of files: decoded at once by several threads, and kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightkit.data.cache import cache_path, load_checked, remove_unused, store_checked
from lightkit.data.image_decoder import ImageHeader, ignore_warnings_of_pillow, read_header
from lightkit.data.image_files import ImageFormat, count_threads, read_picture
from lightkit.data.image_walk import ImageFile
from lightkit.errors import DataError

T = TypeVar("T")

# Counts the changes of the reader after which the same file gives other pixels.
_EDITION = 1

# Pixels that no run has read for so many days are removed when others are written.
_KEPT_DAYS = 30

# The number of files that take seconds to decode, of which a line tells.
_MANY = 500


@dataclass(frozen=True)
class DecodedImages:
    """The images of files.

    Attributes:
        images: uint8 ``(N, H, W)`` or ``(N, C, H, W)``; None if the files were checked alone.
        kept: the indices of the N files that could be read, ascending.
        problems: what is wrong with each of the other files, in their order.
    """

    images: Tensor | None
    kept: list[int]
    problems: list[str]


def decode_files(files: Sequence[ImageFile], form: ImageFormat, keeps_pixels: bool = True) -> DecodedImages:
    """Decodes image files, or reads their pixels from the cache directory.

    The cached pixels count as long as the names, sizes and times of change of all files, the format and the version of
    Pillow are the same.

    Args:
        files: the files.
        form: the format of the images.
        keeps_pixels: False decodes each file to see that it can be read, and keeps no pixels.
    """
    kind = "pixels" if keeps_pixels else "check"
    place = _place(f"images-{kind}", files, [asdict(form), _version_of_pillow()])
    if (found := load_checked(place)) is not None:
        facts, content = found
        images = torch.frombuffer(content, dtype=torch.uint8) if len(content) else torch.empty(0, dtype=torch.uint8)
        return DecodedImages(images.view(-1, *form.shape) if keeps_pixels else None, facts["kept"], facts["problems"])
    if len(files) >= _MANY:
        _tell(f"decoding {len(files):,} images for this run and later ones")
    pixels = np.empty((len(files) if keeps_pixels else 0, *form.shape), np.uint8)

    def decode(index: int) -> str | None:
        try:
            picture = read_picture(files[index].path, form)
        except DataError as error:
            # The folder may lie elsewhere when the cache is read.
            return str(error).replace(str(files[index].path), files[index].name)
        if keeps_pixels:
            pixels[index] = picture.pixels
        return None

    problems = _in_threads(decode, range(len(files)))
    kept = [index for index, problem in enumerate(problems) if problem is None]
    if keeps_pixels and len(kept) < len(files):
        pixels = pixels[kept]
    reasons = [problem for problem in problems if problem is not None]
    _keep(place, {"kept": kept, "problems": reasons}, pixels)
    return DecodedImages(torch.from_numpy(pixels) if keeps_pixels else None, kept, reasons)


def read_headers(files: Sequence[ImageFile]) -> list[ImageHeader]:
    """Returns the headers of those files that have one, from the cache directory if the files are the same as then."""
    place = _place("images-headers", files, [_version_of_pillow()])
    if (found := load_checked(place)) is not None:
        return [ImageHeader(*header) for header in found[0]]

    def read(index: int) -> ImageHeader | None:
        try:
            return read_header(files[index].path)
        except DataError:
            # Decoding says what is wrong with the file.
            return None

    headers = [header for header in _in_threads(read, range(len(files))) if header is not None]
    _keep(place, [[header.height, header.width, header.is_grey] for header in headers])
    return headers


def _in_threads(function: Callable[[int], T], indices: range) -> list[T]:
    with warnings.catch_warnings(), ThreadPoolExecutor(count_threads()) as pool:
        ignore_warnings_of_pillow()
        return list(pool.map(function, indices))


def _place(kind: str, files: Sequence[ImageFile], settings: list[Any]) -> Path:
    """Returns the path of a file of the cache whose name depends on the files and the settings."""
    listed = [[os.fsencode(file.name).hex(), file.size, file.modified] for file in files]
    key = json.dumps([_EDITION, settings, listed])
    return cache_path(f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin")


def _keep(place: Path, facts: Any, content: Any = b"") -> None:
    try:
        remove_unused("images-*.bin", _KEPT_DAYS)
        store_checked(place, facts, content)
    except OSError as error:
        warnings.warn(f"the decoded images cannot be kept for the next run: {error}", stacklevel=3)


def _version_of_pillow() -> str:
    try:
        return version("pillow")
    except PackageNotFoundError:
        return ""


@rank_zero_only
def _tell(line: str) -> None:
    print(line, flush=True)
