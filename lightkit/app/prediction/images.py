"""Classification of an image or of a folder of images."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.atomic_write import write_text_atomically
from lightkit.app.console import print_table
from lightkit.app.prediction.request import PredictionRequest
from lightkit.data.image_files import find_images, read_image
from lightkit.data.images import ImageDataModule
from lightkit.errors import CheckpointError, ConfigError
from lightkit.tasks import ClassificationTask

# The number of predictions that the terminal shows; a file gets all.
_MAX_ROWS = 20

_DEFAULT_BATCH_SIZE = 256


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction for one image.

    Args:
        path: the file of the image.
        label: the name of the most probable class.
        probability: the probability of the class ``label``, from 0 to 1.
        second: the name of the second most probable class; None if the model has one class.
    """

    path: Path
    label: str
    probability: float
    second: str | None


class ImagePredictions:
    """The predictions for several images.

    Args:
        images: the prediction for each image.
    """

    def __init__(self, images: list[ImagePrediction]) -> None:
        self.images = images

    def show(self) -> None:
        """Prints the first predictions."""
        rows = {
            str(p.path): f"{p.label}  ({p.probability:.1%}; else {p.second or 'nothing'})"
            for p in self.images[:_MAX_ROWS]
        }
        if len(self.images) > _MAX_ROWS:
            rows["..."] = f"and {len(self.images) - _MAX_ROWS} more; output=FILE.csv has them all"
        print_table("predictions", rows)

    def write(self, path: Path) -> None:
        """Writes all predictions as CSV."""
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "probability"])
            writer.writerows([p.path, p.label, p.probability] for p in self.images)
            write_text_atomically(path, file.getvalue())


def predict(task: ClassificationTask, data: pl.LightningDataModule, request: PredictionRequest) -> ImagePredictions:
    """Classifies one image, or every image of a folder in the order of their names.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint, which has the image size and the names of the classes.
        request: the request, of which the function reads ``input``, ``invert`` and ``batch_size``.

    Raises:
        CheckpointError: the model and the data module have different numbers of classes.
        ConfigError: an option is wrong, or the data module has no images.
        DataError: a file is not an image.
    """
    invert = "auto" if request.invert is None else request.invert
    batch_size = _DEFAULT_BATCH_SIZE if request.batch_size is None else request.batch_size
    # 1 == True, so that a comparison of values would accept 1.
    if invert != "auto" and type(invert) is not bool:
        raise ConfigError(f"invert must be auto, true or false, got {invert!r}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    paths = find_images(Path(request.require_input("images")))
    if not isinstance(data, ImageDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which are not images")
    pictures = torch.stack([read_image(path, data.image_size, invert) for path in paths])
    probabilities = torch.cat([_probabilities(task, data, part) for part in pictures.split(batch_size)])
    if probabilities.shape[1] != data.num_classes:
        raise CheckpointError(
            f"the model of the checkpoint tells {probabilities.shape[1]} classes apart, and its data have "
            f"{data.num_classes}"
        )
    values, indices = probabilities.topk(min(2, probabilities.shape[1]))
    names = [[data.classes[i] for i in row] for row in indices.tolist()]
    return ImagePredictions(
        [
            ImagePrediction(path, best, float(value[0]), second[0] if second else None)
            for path, value, (best, *second) in zip(paths, values, names, strict=True)
        ]
    )


@torch.inference_mode()
def _probabilities(task: ClassificationTask, data: ImageDataModule, pictures: Tensor) -> Tensor:
    """Returns the probabilities of the classes of images.

    Args:
        task: the task in evaluation mode.
        data: the data module, which preprocesses the images.
        pictures: the images, uint8 ``(N, H, W)``.

    Returns:
        The probabilities ``(N, C)``.
    """
    return task.predict_step(data.to_input(pictures), 0)
