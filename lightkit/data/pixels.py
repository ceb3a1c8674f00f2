"""Conversion of a decoded image of any of Pillow's modes to 8-bit grey or colours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Pixels that are converted at once: the copies of a large image in between take no memory to speak of.
_STRIP = 1 << 22

_WHITE, _BLACK = 255, 0

# A pixel above this value is bright.
_BRIGHT = 127

# A float32 that should be 1 may be a little more.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Depth:
    """The meaning of the values of a file with one channel of more than 8 bits.

    Attributes:
        bits: the number of bits of an integer, such as 16; None if the file does not say it.
        is_inverted: True if 0 is white.
    """

    bits: int | None = None
    is_inverted: bool = False


@dataclass(frozen=True)
class Pixels:
    """The pixels of an image.

    Attributes:
        values: uint8 ``(H, W)`` in grey, ``(H, W, 3)`` in colour: red, green, blue.
        source: the range of the values in the file, such as "16-bit values from 0 to 4095"; "" for 8 bits and less.
    """

    values: NDArray[np.uint8]
    source: str = ""


def is_grey(image: Image.Image) -> bool:
    """Returns True if the mode of an image, loaded or not, or its palette, has shades of grey alone."""
    if image.mode in ("P", "PA"):
        palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def to_pixels(image: Image.Image, name: str, depth: Depth, key: Any = None, channels: int = 1) -> Pixels:
    """Converts a loaded image to 8-bit grey or to 8-bit red, green and blue.

    A value ``v`` of 16 bits becomes ``v >> 8``. A float ``v`` from 0 to 1 becomes ``255 v``, rounded. A transparent
    image is laid on white; it is laid on black if nothing of it is dark on white and it has more contrast on black.

    Args:
        image: the loaded image.
        name: the name of the image in messages.
        depth: the meaning of its values if the mode has more than 8 bits.
        key: the value of the transparent pixels, in the units of ``image``, or None. A mode with a palette has it in
            ``image.info``.
        channels: 1 for grey, the luma of colours, or 3 for colour, in which all three values of a grey pixel are equal.

    Raises:
        DataError: the values are not finite or beyond the range above, or it is not clear which range they have.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        deep = _convert_deep(image, name, depth, key)
        return deep if channels == 1 else Pixels(np.stack([deep.values] * 3, axis=2), deep.source)
    convert = _luma if channels == 1 else _colours
    shape = (image.height, image.width) if channels == 1 else (image.height, image.width, 3)
    values = np.empty(shape, np.uint8)
    has_alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or (image.mode == "P" and "transparency" in image.info)
    alpha = np.empty(shape[:2], np.uint8) if has_alpha or key is not None else None
    for rows, strip in _strips(image):
        if alpha is None:
            values[rows] = convert(strip)
        elif key is not None:
            values[rows] = convert(strip)
            # NumPy takes the mode "1" as True and False.
            is_transparent = np.asarray(strip.convert("L") if strip.mode == "1" else strip) == np.asarray(key)
            alpha[rows] = np.where(is_transparent.all(axis=2) if is_transparent.ndim == 3 else is_transparent, 0, 255)
        else:
            rgba = strip.convert("RGBA")
            values[rows], alpha[rows] = convert(rgba), np.asarray(rgba.getchannel("A"))
    if alpha is not None:
        _lay_on_ground(values, alpha)
    return Pixels(values)


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yields the rows and the content of horizontal strips of an image."""
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _luma(image: Image.Image) -> NDArray[np.uint8]:
    # Pillow converts only some modes to L directly. The transparency has no part in it.
    image.info.pop("transparency", None)
    grey = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
    return np.asarray(grey.convert("L"))


def _colours(image: Image.Image) -> NDArray[np.uint8]:
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def _convert_deep(image: Image.Image, name: str, depth: Depth, key: Any) -> Pixels:
    """Converts an image of a mode with more than 8 bits to grey: see `to_pixels`."""
    is_float = image.mode == "F"
    limits = [_limits(np.asarray(strip)) for _, strip in _strips(image)]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    # A NaN makes its sum NaN, wherever it stands.
    if not np.isfinite(sum(low + high for low, high in limits)):
        raise DataError(f"{name} has values that are not finite (mode {image.mode}); expected values from 0 to 1")
    bits = 16 if depth.bits is None or depth.bits > 16 else depth.bits
    if is_float:
        kind, expected, most = "floating-point values", "values from 0 to 1", 1 + _TOLERANCE
    else:
        kind, expected, most = f"{depth.bits or 16}-bit values", f"values from 0 to {(1 << bits) - 1}", (1 << bits) - 1
    if low < 0 or high > most:
        raise DataError(f"{name} has {kind} from {low:g} to {high:g} (mode {image.mode}); expected {expected}")
    if not is_float and depth.bits is not None and depth.bits > 16 and 0 < high <= 255:
        # Such a file comes from a program that has not chosen the width; as 16 bits all of it would be black.
        raise DataError(
            f"{name} has {kind} from {low:g} to {high:g} (mode {image.mode}), which may stand for grey of 8 or of 16 "
            "bits: save it with one of these"
        )
    grey = np.empty((image.height, image.width), np.uint8)
    alpha = None if key is None else np.empty_like(grey)
    for rows, strip in _strips(image):
        values = np.asarray(strip)
        if alpha is not None:
            alpha[rows] = np.where(values == key, 0, 255)
        grey[rows] = np.rint(values.astype(np.float64).clip(0, 1) * 255) if is_float else values >> (bits - 8)
    if depth.is_inverted:
        np.subtract(255, grey, out=grey)
    if alpha is not None:
        _lay_on_ground(grey, alpha)
    return Pixels(grey, f"{kind} from {low:g} to {high:g}")


def _limits(values: NDArray[Any]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _lay_on_ground(values: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> None:
    """Lays an image in place on white or on black: see `to_pixels`.

    Args:
        values: the pixels ``(H, W)`` or ``(H, W, 3)``.
        alpha: the opacity ``(H, W)``, from 0 to 255.
    """
    height = max(1, _STRIP // values.shape[1])
    strips = [slice(top, top + height) for top in range(0, len(values), height)]

    def limits(ground: int) -> tuple[float, float]:
        parts = [_limits(_laid(_brightness(values[rows]), alpha[rows], ground)) for rows in strips]
        return min(low for low, _ in parts), max(high for _, high in parts)

    ground = _WHITE
    low, high = limits(_WHITE)
    # White ink would vanish on white. Paper with dark ink, whose margin is transparent, belongs on white.
    if low > _BRIGHT:
        low_on_black, high_on_black = limits(_BLACK)
        ground = _BLACK if high_on_black - low_on_black > high - low else _WHITE
    for rows in strips:
        opacity = alpha[rows] if values.ndim == 2 else alpha[rows, :, np.newaxis]
        values[rows] = _laid(values[rows], opacity, ground)


def _brightness(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the luma of pixels, rounded as Pillow rounds it."""
    if values.ndim == 2:
        return values
    red, green, blue = (values[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def _laid(values: NDArray[np.uint8], alpha: NDArray[np.uint8], ground: int) -> NDArray[np.uint8]:
    opacity = alpha.astype(np.uint32)
    return ((values * opacity + ground * (255 - opacity) + 127) // 255).astype(np.uint8)
