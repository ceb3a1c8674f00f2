"""Image files as a model for small grey images takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightkit._util.installation import how_to_install
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular, warn_of_skipped
from lightkit.errors import DataError

# What Pillow reads by itself; for some other formats it starts programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")

# Of a file. Pixels are held several times, with four bytes each.
_MOST_BYTES = 1 << 30
_MOST_PIXELS, _LONGEST_SIDE = 120_000_000, 1 << 15

_SUFFIXES = (".png", ".jpg", ".jpeg")
_BRIGHT = 127


def find_pictures(path: Path) -> list[Path]:
    """The picture at a path, or the pictures in a folder, sorted by name.

    Raises:
        DataError: there is nothing there, or a folder holds something that is not a picture.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"input={path} does not exist")
    if not path.is_dir():
        # Says which kind it is.
        open_regular(path, name=f"input={path}").close()
    # Hidden files are what file managers leave behind, not what somebody wants classified.
    entries = sorted(p for p in path.iterdir() if not p.name.startswith(".") and not p.is_dir())
    files = [p for p in entries if p.is_file()]
    warn_of_skipped([p for p in entries if not p.is_file()])
    strangers = [printable(p.name) for p in files if p.suffix.lower() not in _SUFFIXES]
    if strangers:
        raise DataError(f"{path} holds files that are not PNG or JPEG pictures: {', '.join(strangers[:5])}")
    if not files:
        raise DataError(f"{path} holds no pictures (PNG or JPEG)")
    return files


def read_picture(path: Path, size: int, invert: bool | str = "auto") -> Tensor:
    """Reads a PNG or JPEG of any size as uint8 ``(size, size)``, grey, light on dark.

    Args:
        path: the file.
        size: what it is scaled to; the shorter side is filled up with the background first.
        invert: True, False, or ``"auto"``: if it is not of this size and its border is bright.

    Raises:
        DataError: Pillow is missing, or the file is not a picture that it can read.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DataError(f"reading pictures needs Pillow: {how_to_install('app')}") from error
    try:
        with open_regular(path, _MOST_BYTES) as file, Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS or max(image.size) > _LONGEST_SIDE:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, and at most {_MOST_PIXELS:,} are read, of "
                    f"sides up to {_LONGEST_SIDE:,}"
                )
            # Transparent means paper, not black.
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            grey = ImageOps.exif_transpose(image).convert("L")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not a picture (PNG or JPEG)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is a damaged picture: {error}") from error

    pixels = np.asarray(grey)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if invert is True or (invert == "auto" and grey.size != (size, size) and border.mean() > _BRIGHT):
        grey, border = ImageOps.invert(grey), 255 - border
    if grey.size != (size, size):
        grey = ImageOps.pad(grey, (size, size), method=Image.Resampling.LANCZOS, color=int(np.median(border)))
    return torch.from_numpy(np.array(grey))
