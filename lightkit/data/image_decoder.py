"""A decoder of image files, which holds a few bytes of memory for each pixel and no more than a limit of pixels."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightkit._util.installation import how_to_install
from lightkit._util.regular_files import open_regular
from lightkit.data.pixels import Depth, is_grey, to_pixels
from lightkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# The formats that Pillow decodes itself, by which messages call them. Pillow starts programs for some others.
FORMATS = "PNG, JPEG, TIFF, WebP, BMP or GIF"
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")

# Formats whose files may have several images that a viewer shows. A photograph in the format MPO has a preview.
_FORMATS_WITH_FRAMES = ("PNG", "TIFF", "WEBP", "GIF")

# Limits of a file. A pixel takes up to 4 bytes in Pillow and 2 here, and 8 more in the library for WebP: 1.5 GB in all.
_MAX_BYTES = 1 << 31
_MAX_PIXELS, _MAX_PIXELS_OF_WEBP = 250_000_000, 125_000_000

# A JPEG file with more pixels is scaled while it is decoded, which takes a quarter of the time. At least this many
# pixels of it remain for a pixel of the result, in each direction.
_JPEG = ("JPEG", "MPO")
_LARGE, _OVERSAMPLING = 1_000_000, 4

_MAX_SIDE = 1 << 20

_lock = threading.Lock()

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

# A byte of a deflate stream stands for at most this number of bytes.
_MAX_DEFLATE_RATIO = 1032

_TIFF_BITS, _TIFF_PHOTOMETRIC, _ORIENTATION = 258, 262, 274

# The orientations in which the rows of the file are the columns of the scene.
_LYING = (5, 6, 7, 8)

# Exceptions by which Pillow rejects a file.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError),
    *(struct.error, zlib.error),
)


@dataclass(frozen=True)
class DecodedImage:
    """The upright content of an image file.

    Attributes:
        pixels: uint8 ``(H, W)`` in grey, ``(H, W, 3)`` in colour.
        source: the range of the values in the file if they have more than 8 bits: see `lightkit.data.pixels.Pixels`.
        is_first_of_several: True if the file has more frames or pages.
    """

    pixels: NDArray[np.uint8]
    source: str
    is_first_of_several: bool


@dataclass(frozen=True)
class ImageHeader:
    """The properties of an image file that are known without its pixels.

    Attributes:
        height: the height of the upright image in pixels.
        width: its width.
        is_grey: True if the file has shades of grey alone: see `lightkit.data.pixels.is_grey`.
    """

    height: int
    width: int
    is_grey: bool


def read_header(path: Path) -> ImageHeader:
    """Reads the header of an image file.

    Raises:
        DataError: as in `decode`.
    """
    with _opened(path, str(path)) as (image, _):
        sides = image.size if _orientation(image) in _LYING else (image.height, image.width)
        return ImageHeader(*sides, is_grey(image))


def decode(source: Path | bytes, size: tuple[int, int], channels: int = 1, name: str | None = None) -> DecodedImage:
    """Decodes the first frame or page of an image file, and turns it upright as its EXIF data say.

    Args:
        source: a file of one of `FORMATS`, whatever its suffix, or the content of such a file.
        size: height and width to which the caller scales the image. A large JPEG file is decoded smaller, at several
            times this size.
        channels: 1 for grey, 3 for colour.
        name: the name of the image in messages; None for the path of the file.

    Raises:
        DataError: Pillow is missing, or the file cannot be read, is empty, has too many pixels, is damaged, is no
            image, or has values of an unknown range.
    """
    name = str(source if isinstance(source, Path) else "the image") if name is None else name
    with _opened(source, name) as (image, png_depth):
        # The number of frames is known before the first is loaded, and lost after that.
        several = image.format in _FORMATS_WITH_FRAMES and bool(getattr(image, "is_animated", False))
        if image.format in _JPEG and image.width * image.height > _LARGE:
            image.draft(image.mode, (_OVERSAMPLING * size[1], _OVERSAMPLING * size[0]))
        key = _transparent_value(image, png_depth)
        depth = _depth(image, png_depth)
        image.load()
        pixels = to_pixels(image, name, depth, key, channels)
        return DecodedImage(_upright(pixels.values, _orientation(image)), pixels.source, several)


def ignore_warnings_of_pillow() -> None:
    """Makes the process ignore Pillow's warnings, which are of metadata and change no pixel.

    Warnings belong to a process and not to a thread: the caller of `decode` calls this function before it starts
    threads, within ``warnings.catch_warnings`` if it waits for them.
    """
    warnings.filterwarnings("ignore", module="PIL")


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Image.Image, int | None]]:
    """Opens an image file, and yields the image, not loaded yet, and the bits of a channel of a PNG file.

    Args:
        source: the file or its content.
        name: the name of the file in messages.

    Raises:
        DataError: the file, or the use of the image within the context, fails: see `decode`.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(f"reading images needs Pillow: {how_to_install('app')}") from error
    with open_regular(source, _MAX_BYTES, name) if isinstance(source, Path) else io.BytesIO(source) as file:
        length = os.fstat(file.fileno()).st_size if isinstance(source, Path) else len(source)
        if length == 0:
            raise DataError(f"{name} is empty (0 bytes)")
        png_depth = _check_png_header(file, length, name)
        try:
            with _without_limit_of_pillow():
                image = Image.open(file, formats=_FORMATS)
                _check_size(image, name)
            with image:
                yield image, png_depth
        except DataError:
            raise
        except UnidentifiedImageError as error:
            raise DataError(f"{name} is not an image ({FORMATS}), or of a kind that Pillow cannot read") from error
        except MemoryError as error:
            raise DataError(f"{name} takes more memory than there is") from error
        except _DAMAGE as error:
            raise DataError(f"{name} is a damaged image: {error}") from error


@contextmanager
def _without_limit_of_pillow() -> Iterator[None]:
    """Lifts Pillow's own limit of pixels, which is a variable of the module, in favour of `_check_size`."""
    from PIL import Image

    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str) -> None:
    most = _MAX_PIXELS_OF_WEBP if image.format == "WEBP" else _MAX_PIXELS
    if image.width * image.height > most or max(image.size) > _MAX_SIDE:
        raise DataError(
            f"{name} is too large: it has {image.width} x {image.height} pixels; the limits are {most:,} pixels and "
            f"sides of {_MAX_SIDE:,}"
        )


def _check_png_header(file: BinaryIO, length: int, name: str) -> int | None:
    """Rejects a PNG file that is too short for the pixels that its header declares, before they take any memory.

    Args:
        file: the file at its beginning, where the function leaves it.
        length: its length in bytes.
        name: its name in messages.

    Returns:
        The number of bits of a channel; None if the file is no PNG file.
    """
    header = file.read(26)
    file.seek(0)
    if len(header) < 26 or not header.startswith(_PNG):
        return None
    width, height, bits, colours = struct.unpack(">IIBB", header[16:])
    declared = height * ((width * bits * _PNG_CHANNELS.get(colours, 1) + 7) // 8)
    if width * height <= _MAX_PIXELS and declared > _MAX_DEFLATE_RATIO * length:
        raise DataError(
            f"{name} is truncated: it has {width} x {height} pixels, for which its {length:,} bytes are too few"
        )
    return bits


def _depth(image: Image.Image, png_depth: int | None) -> Depth:
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    if tags is None:
        return Depth(png_depth)
    bits = tags.get(_TIFF_BITS, 16)
    # Pillow turns values around for which 0 is white only up to 8 bits.
    return Depth(bits[0] if isinstance(bits, tuple) else bits, is_inverted=tags.get(_TIFF_PHOTOMETRIC) == 0)


def _transparent_value(image: Image.Image, png_depth: int | None) -> Any:
    """Returns the value of the transparent pixels of a grey or an RGB image in the units of its mode, or None.

    Pillow scales the pixels of a PNG file with 2, 4 or 16 bits to 8, and leaves the value as it is.
    """
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int):
        return key * 255 // ((1 << png_depth) - 1) if png_depth in (2, 4) else key
    if image.mode == "RGB" and isinstance(key, tuple):
        return tuple(part >> 8 for part in key) if png_depth == 16 else key
    return key if image.mode in ("1", "I", "I;16") and isinstance(key, int) else None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        # A viewer shows an image with damaged EXIF data, too.
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Returns a view of ``pixels`` ``(H, W, ...)`` in which the scene is upright.

    Args:
        pixels: the pixels as the file has them.
        orientation: the value of the EXIF tag 274; one that is not from 2 to 8 changes nothing.
    """
    if orientation in _LYING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
