"""Readers of PNG and JPEG files, which convert them to the small grey images that a model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightkit._util.installation import how_to_install
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular, warn_of_skipped
from lightkit.errors import DataError

# Formats that Pillow decodes itself. It starts programs for some others.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")

# Limits of a file. Pillow holds the pixels several times, with four bytes each.
_MAX_BYTES = 1 << 30
_MAX_PIXELS, _MAX_SIDE = 120_000_000, 1 << 15

_SUFFIXES = (".png", ".jpg", ".jpeg")

# A border whose mean is above this value is paper.
_BRIGHT = 127


def find_images(path: Path) -> list[Path]:
    """Returns ``path`` if it is a file, or the PNG and JPEG files directly in it, sorted by name, if it is a folder.

    Hidden files and subfolders are left out.

    Raises:
        DataError: ``path`` does not exist, or the folder has no image, or a file that is no PNG or JPEG.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"input={path} does not exist")
    if not path.is_dir():
        # Raises an error that names the kind of file.
        open_regular(path, name=f"input={path}").close()
    # File managers leave hidden files behind.
    entries = sorted(p for p in path.iterdir() if not p.name.startswith(".") and not p.is_dir())
    files = [p for p in entries if p.is_file()]
    warn_of_skipped([p for p in entries if not p.is_file()])
    others = [printable(p.name) for p in files if p.suffix.lower() not in _SUFFIXES]
    if others:
        raise DataError(f"{path} holds files that are not PNG or JPEG images: {', '.join(others[:5])}")
    if not files:
        raise DataError(f"{path} holds no images (PNG or JPEG)")
    return files


def read_image(path: Path, size: int, invert: bool | Literal["auto"] = "auto") -> Tensor:
    """Reads an image of any size as grey uint8 ``(size, size)``, light on dark.

    Args:
        path: a PNG or JPEG file.
        size: height and width of the result. The image is scaled to fit; if it is not square, it is padded with the
            median of its border.
        invert: True inverts the image, False does not; ``"auto"`` inverts an image that is not ``size`` by ``size`` and
            whose border is bright on average.

    Raises:
        DataError: Pillow is missing, or the file is no image that Pillow can read, or the image is too large.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DataError(f"reading images needs Pillow: {how_to_install('app')}") from error
    try:
        with open_regular(path, _MAX_BYTES) as file, Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS or max(image.size) > _MAX_SIDE:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels; the limits are {_MAX_PIXELS:,} pixels and "
                    f"sides of {_MAX_SIDE:,}"
                )
            # A transparent background stands for white paper.
            opaque: Image.Image = image
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            grey = ImageOps.exif_transpose(opaque).convert("L")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image (PNG or JPEG)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is a damaged image: {error}") from error

    pixels = np.asarray(grey)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if invert is True or (invert == "auto" and grey.size != (size, size) and border.mean() > _BRIGHT):
        grey, border = ImageOps.invert(grey), 255 - border
    if grey.size != (size, size):
        grey = ImageOps.pad(grey, (size, size), method=Image.Resampling.LANCZOS, color=int(np.median(border)))
    return torch.from_numpy(np.array(grey))
