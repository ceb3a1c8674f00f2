"""Random changes of whole batches of images on their device, for the training alone.

Each class is a callable of images, floating point ``(N, C, H, W)`` in [0, 1], that returns images of the same shape and
range. Each image of a batch gets its own draw from torch's generator of the device. A data module seeds that generator
for each batch by its own seed, the rank, the epoch and the number of the batch: see `lightkit.data.ImageDataModule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightkit.errors import DataError

__all__ = ["Affine", "ColorJitter", "Compose", "Crop", "Erase", "Flip", "preset"]

Transform = Callable[[Tensor], Tensor]

# The weights of red, green and blue in the luma of ITU-R BT.601, as Pillow has them.
_LUMA = (0.299, 0.587, 0.114)


class Compose(nn.Module):
    """Applies several transforms in their order.

    Args:
        transforms: callables of images, such as the classes of this module or a user's own.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        self.transforms = list(transforms)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the transformed images ``(N, C, H, W)``."""
        for transform in self.transforms:
            images = transform(images)
        return images


class Flip(nn.Module):
    """Mirrors each image with a probability.

    Args:
        horizontal: the probability of exchanging left and right.
        vertical: the probability of exchanging top and bottom.

    Raises:
        DataError: a probability is not from 0 to 1.
    """

    def __init__(self, horizontal: float = 0.5, vertical: float = 0.0) -> None:
        super().__init__()
        _check_probability(horizontal=horizontal, vertical=vertical)
        self.horizontal = horizontal
        self.vertical = vertical

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images ``(N, C, H, W)``, some of them mirrored."""
        for probability, dimension in ((self.horizontal, 3), (self.vertical, 2)):
            if probability > 0:
                images = torch.where(_draw(images) < probability, images.flip(dimension), images)
        return images


class Crop(nn.Module):
    """Moves each image by a random number of whole pixels, as padding and a crop at a random place do.

    Args:
        padding: the largest number of pixels in each direction; at most the height or width less one counts.
        fill: what appears at the borders: ``"reflect"`` mirrors the image there, ``"zeros"`` is black.

    Raises:
        DataError: ``padding`` is negative, or ``fill`` is unknown.
    """

    def __init__(self, padding: int = 4, fill: str = "reflect") -> None:
        super().__init__()
        if padding < 0:
            raise DataError(f"padding must be at least 0, got {padding}")
        if fill not in ("reflect", "zeros"):
            raise DataError(f"fill must be reflect or zeros, got {fill!r}")
        self.padding = padding
        self.fill = fill

    def forward(self, images: Tensor) -> Tensor:
        """Returns the moved images ``(N, C, H, W)``."""
        for dimension in (2, 3):
            images = self._move(images, dimension)
        return images

    def _move(self, images: Tensor, dimension: int) -> Tensor:
        last = images.shape[dimension] - 1
        most = min(self.padding, last)
        offsets = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
        places = torch.arange(last + 1, device=images.device) + offsets
        shape = (len(images), 1, last + 1, 1) if dimension == 2 else (len(images), 1, 1, last + 1)
        mirrored = last - (last - places.abs()).abs()
        moved = images.gather(dimension, mirrored.view(shape).expand_as(images))
        if self.fill == "reflect":
            return moved
        return moved * ((places >= 0) & (places <= last)).view(shape)


class Affine(nn.Module):
    """Rotates, scales, shears and moves each image, by one interpolation.

    Args:
        degrees: the largest angle of a rotation in either direction.
        scale: the smallest and the largest factor of the size.
        translate: the largest shift, as a share of the height and of the width.
        shear: the largest angle in degrees by which vertical lines lean.
        fill: what appears at the borders: ``"reflection"``, ``"border"`` or ``"zeros"``, as in
            ``torch.nn.functional.grid_sample``.

    Raises:
        DataError: an argument is out of its range.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        scale: Sequence[float] = (0.9, 1.1),
        translate: float = 0.1,
        shear: float = 0.0,
        fill: str = "reflection",
    ) -> None:
        super().__init__()
        if fill not in ("reflection", "border", "zeros"):
            raise DataError(f"fill must be reflection, border or zeros, got {fill!r}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise DataError(f"scale must be two positive factors, the smaller first, got {list(scale)}")
        if not 0 <= translate <= 1 or not 0 <= shear < 90 or degrees < 0:
            raise DataError(
                f"degrees must be at least 0, translate from 0 to 1 and shear from 0 to below 90, got {degrees}, "
                f"{translate} and {shear}"
            )
        self.degrees = degrees
        self.scale = tuple(scale)
        self.translate = translate
        self.shear = shear
        self.fill = fill

    def forward(self, images: Tensor) -> Tensor:
        """Returns the transformed images ``(N, C, H, W)``."""
        count, _, height, width = images.shape
        if count == 0:
            return images
        drawn = torch.rand(5, count, device=images.device, dtype=torch.float32) * 2 - 1
        angle = drawn[0] * math.radians(self.degrees)
        low, high = (math.log(factor) for factor in self.scale)
        # The grid says where each pixel comes from: an enlarged image comes from a smaller part.
        factor = torch.exp(-(low + (high - low) * (drawn[1] + 1) / 2))
        lean = torch.tan(drawn[2] * math.radians(self.shear))
        cos, sin = angle.cos() * factor, angle.sin() * factor
        # Coordinates run from -1 to 1 in both directions, whatever the height and the width are.
        ratio = height / width
        theta = torch.stack(
            [
                *(cos, (cos * lean - sin) * ratio, drawn[3] * self.translate * 2),
                *(sin / ratio, sin * lean + cos, drawn[4] * self.translate * 2),
            ],
            dim=1,
        ).view(count, 2, 3)
        grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.fill, align_corners=False)


class ColorJitter(nn.Module):
    """Changes brightness, contrast and saturation of each image by factors from ``1 - x`` to ``1 + x``.

    Args:
        brightness: the x of all values.
        contrast: the x of the differences to the mean luma of the image.
        saturation: the x of the differences to the luma of the pixel; it concerns images of three channels alone.

    Raises:
        DataError: an argument is not from 0 to 1.
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2) -> None:
        super().__init__()
        _check_probability(brightness=brightness, contrast=contrast, saturation=saturation)
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation

    def forward(self, images: Tensor) -> Tensor:
        """Returns the changed images ``(N, C, H, W)``, clipped to [0, 1]."""
        brightness, contrast, saturation = (
            1 + (2 * _draw(images) - 1) * most for most in (self.brightness, self.contrast, self.saturation)
        )
        images = images * brightness
        luma = _luma(images)
        if images.shape[1] == 3 and self.saturation > 0:
            images = torch.lerp(luma, images, saturation)
        mean = luma.mean(dim=(2, 3), keepdim=True)
        return torch.lerp(mean, images, contrast).clamp_(0, 1)


class Erase(nn.Module):
    """Covers a random rectangle of each image with a probability [1]_.

    Args:
        probability: the probability that an image loses a rectangle.
        area: the smallest and the largest share of the image that the rectangle covers.
        ratio: the largest ratio of the longer side of the rectangle to the shorter one.
        value: the value of the rectangle, from 0 to 1.

    Raises:
        DataError: an argument is out of its range.

    References:
        .. [1] Zhong et al., Random Erasing Data Augmentation, AAAI 2020.
    """

    def __init__(
        self, probability: float = 0.5, area: Sequence[float] = (0.02, 0.2), ratio: float = 3.0, value: float = 0.0
    ) -> None:
        super().__init__()
        _check_probability(probability=probability, value=value)
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1 or ratio < 1:
            raise DataError(
                f"area must be two shares from 0 to 1, the smaller first, and ratio at least 1, got {list(area)} and "
                f"{ratio}"
            )
        self.probability = probability
        self.area = tuple(area)
        self.ratio = ratio
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images ``(N, C, H, W)``, some of them with a rectangle."""
        height, width = images.shape[2:]
        drawn = torch.rand(5, len(images), 1, device=images.device)
        share = self.area[0] + (self.area[1] - self.area[0]) * drawn[0]
        stretch = torch.exp((2 * drawn[1] - 1) * math.log(self.ratio) / 2)
        high = (share.sqrt() * stretch * height).clamp(max=height)
        wide = (share.sqrt() / stretch * width).clamp(max=width)
        rows = _within(height, high, drawn[2]).view(len(images), 1, height, 1)
        columns = _within(width, wide, drawn[3]).view(len(images), 1, 1, width)
        chosen = (drawn[4] < self.probability).view(-1, 1, 1, 1)
        return images.masked_fill(rows & columns & chosen, self.value)


def _within(side: int, length: Tensor, place: Tensor) -> Tensor:
    """Returns True for the pixels of an interval: bool ``(N, side)``, for ``length`` and ``place`` ``(N, 1)``."""
    start = place * (side - length)
    middle = torch.arange(side, device=length.device) + 0.5
    return (middle >= start) & (middle < start + length)


def _draw(images: Tensor) -> Tensor:
    """Returns a number from 0 to 1 for each image, ``(N, 1, 1, 1)``."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _luma(images: Tensor) -> Tensor:
    """Returns the luma ``(N, 1, H, W)`` of images of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = torch.tensor(_LUMA, device=images.device, dtype=images.dtype)
    return (images * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _check_probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise DataError(f"{name} must be from 0 to 1, got {value}")


# Digits and letters change their meaning when they are mirrored: the presets for grey images do not flip.
_PRESETS: dict[str, Callable[[bool], list[Transform]]] = {
    "light": lambda colour: [*([Flip()] if colour else []), Crop(padding=2, fill="reflect")],
    "strong": lambda colour: [
        *([Flip()] if colour else []),
        Affine(degrees=12, scale=(0.85, 1.15), translate=0.08, shear=5, fill="border"),
        *([ColorJitter()] if colour else []),
        Erase(probability=0.25),
    ],
}


def preset(name: str, channels: int) -> Compose:
    """Returns the transforms that one word stands for.

    ``"light"`` moves images by up to two pixels. ``"strong"`` rotates, scales, shears and moves them, and covers a
    rectangle of each fourth. Both mirror images in colour, and ``"strong"`` changes their colours.

    Args:
        name: ``"light"`` or ``"strong"``.
        channels: the number of channels of the images.

    Raises:
        DataError: the name is unknown.
    """
    if name not in _PRESETS:
        raise DataError(f"transform must be one of {', '.join(_PRESETS)}, or transforms, got {name!r}")
    return Compose(_PRESETS[name](channels == 3))
