"""Images: one for each request, as a file, in base64 within JSON, or as rows of pixels."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightkit._util.installation import how_to_install
from lightkit.app.prediction.images import check_options, classify, name_classes, with_inversion
from lightkit.app.serving.bodies import is_json, one_of, read_object, shown, take_options
from lightkit.app.serving.kinds.kind import Kind, device_of
from lightkit.app.serving.messages import Request, RequestError
from lightkit.data import ImageDataModule
from lightkit.data.image_decoder import FORMATS, decode
from lightkit.data.image_files import ImageFormat, to_format
from lightkit.data.pixels import Depth, to_pixels
from lightkit.errors import DataError

_CONTENT = ("image", "pixels")


@dataclass(frozen=True)
class ImageSample:
    """An image in the format of the model.

    Attributes:
        pixels: uint8 ``(H, W)``, or ``(3, H, W)`` in colour.
        top_k: the number of the most probable classes that the answer lists; None for no list.
    """

    pixels: NDArray[np.uint8]
    top_k: int | None


class Images(Kind):
    """Images of any size, of which the model tells the class.

    Args:
        task: the task in evaluation mode.
        data: the data module, which has the names of the classes.
        form: the format of the images that the model takes.
    """

    name = "images"
    media_types = ("image/",)

    def __init__(self, task: pl.LightningModule, data: ImageDataModule, form: ImageFormat) -> None:
        self._task = task
        self._data = data
        self._form = form
        self.options = {
            "invert": {
                "enum": ["auto", True, False],
                "description": "Invert the brightness; auto inverts a grey image of another size with a bright border.",
            },
            "top_k": {
                "type": "integer",
                "minimum": 1,
                "maximum": data.num_classes,
                "description": "List this number of the most probable classes, too.",
            },
        }

    def about(self) -> dict[str, Any]:
        """Returns the size and the channels of the images, and the names of the classes."""
        height, width = self._form.size
        form = {"height": height, "width": width, "channels": self._form.channels, "fit": self._form.fit}
        return {"input": form, "classes": list(self._data.classes)}

    def content_schema(self) -> dict[str, Any]:
        """Returns the schemas of an image in base64 and of pixels."""
        return {
            "image": {
                "type": "string",
                "format": "byte",
                "description": f"The content of a {FORMATS} file in base64.",
            },
            "pixels": {
                "type": "array",
                "items": {"type": "array", "items": {}},
                "description": "The rows of an image of any size. A pixel is a number from 0 to 255, or a list of red, "
                "green and blue.",
            },
        }

    def example(self) -> dict[str, Any]:
        """Returns a small image as pixels."""
        height, width = (min(side, 8) for side in self._form.size)
        return {"pixels": [[16 * (row + column) for column in range(width)] for row in range(height)]}

    def decode(self, request: Request) -> ImageSample:
        """Returns the image of a request in the format of the model: see `Kind.decode`."""
        if is_json(request, self.media_types):
            fields = read_object(request.body)
            which = one_of(fields, _CONTENT)
            options = take_options(fields, request.query, tuple(self.options), _CONTENT)
        else:
            fields, which = {}, "body"
            options = take_options(fields, request.query, tuple(self.options))
        check_options(options, self._data)
        form = with_inversion(self._form, options)
        if which == "pixels":
            pixels = _convert(_to_array(fields["pixels"]), form.channels)
        else:
            name, content = ("the body", request.body) if which == "body" else ("image", _from_base64(fields["image"]))
            pixels = decode(content, form.size, form.channels, name).pixels
        return ImageSample(to_format(pixels, form), options.top_k)

    def predict(self, samples: list[ImageSample]) -> list[Tensor]:
        """Returns the probabilities of the classes, ``(C)``, of each image."""
        pictures = torch.from_numpy(np.stack([sample.pixels for sample in samples])).to(device_of(self._task))
        return list(classify(self._task, self._data, pictures).cpu())

    def encode(self, sample: ImageSample, output: Tensor) -> dict[str, Any]:
        """Returns the most probable class and the probabilities of all."""
        named = name_classes([Path("image")], output[None], self._data, {}, sample.top_k)
        (entry,) = named.entries()
        return {name: value for name, value in entry.items() if name != "path"}


def _from_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError(400, f"image must be a text in base64, got {shown(text)}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"image must be a text in base64, got {shown(text)}: {error}") from error


def _to_array(rows: Any) -> NDArray[np.uint8]:
    """Returns pixels as uint8 ``(H, W)`` or ``(H, W, 3)``."""
    expected = "rows of equally many pixels, numbers from 0 to 255 or lists of red, green and blue"
    if not isinstance(rows, list):
        raise RequestError(400, f"pixels must be {expected}, got {shown(rows)}")
    try:
        array = np.array(rows)
    except ValueError as error:
        raise RequestError(400, f"pixels must be {expected}, got rows of different lengths") from error
    if array.dtype.kind not in "iu" or array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (3,)):
        kind = "whole numbers" if array.dtype.kind in "iu" else "values that are no whole numbers,"
        raise RequestError(400, f"pixels must be {expected}, got {kind} of the shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise RequestError(400, f"pixels must be numbers from 0 to 255, got {low if low < 0 else high}")
    return array.astype(np.uint8)


def _convert(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Returns pixels with the channels of the model, as those of an image file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"pixels need Pillow on the server: {how_to_install('app')}") from error
    return to_pixels(Image.fromarray(pixels), "pixels", Depth(), None, channels).values
