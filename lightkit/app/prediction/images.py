"""Classifies an image, or a folder of images."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightkit._util.atomic_write import write_text_atomically
from lightkit.app.console import print_table
from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.restore import Restored
from lightkit.data.images import ImageDataModule
from lightkit.data.pictures import find_pictures, read_picture
from lightkit.errors import CheckpointError, ConfigError

# How many predictions the terminal shows; a file gets all.
_SHOWN = 20

_BATCH_SIZE = 256


@dataclass(frozen=True)
class Image:
    """The class of one image, and how sure the model is of it."""

    path: Path
    label: str
    probability: float
    second: str | None


class Images:
    """The classes of some images."""

    def __init__(self, images: list[Image]) -> None:
        self.images = images

    def show(self) -> None:
        """Prints the first ones."""
        rows = {
            str(p.path): f"{p.label}  ({p.probability:.1%}; else {p.second or 'nothing'})" for p in self.images[:_SHOWN]
        }
        if len(self.images) > _SHOWN:
            rows["..."] = f"and {len(self.images) - _SHOWN} more; output=FILE.csv has them all"
        print_table("predictions", rows)

    def write(self, path: Path) -> None:
        """Writes CSV."""
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "probability"])
            writer.writerows([p.path, p.label, p.probability] for p in self.images)
            write_text_atomically(path, file.getvalue())


def predict(restored: Restored, request: PredictionRequest) -> Images:
    """Classifies one image, or every image of a folder in the order of their names."""
    invert = "auto" if request.invert is None else request.invert
    batch_size = _BATCH_SIZE if request.batch_size is None else request.batch_size
    # By type: 1 equals true, and would then not be taken for it.
    if invert != "auto" and type(invert) is not bool:
        raise ConfigError(f"invert must be auto, true or false, got {invert!r}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    paths = find_pictures(Path(str(request.input)))
    data = restored.build_data()
    if not isinstance(data, ImageDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which are not images")
    pictures = torch.stack([read_picture(path, data.image_size, invert) for path in paths])
    probabilities = torch.cat([_probabilities(restored.task, data, part) for part in pictures.split(batch_size)])
    if probabilities.shape[1] != data.num_classes:
        raise CheckpointError(
            f"the model of the checkpoint tells {probabilities.shape[1]} classes apart, and its data have "
            f"{data.num_classes}"
        )
    values, indices = probabilities.topk(min(2, probabilities.shape[1]))
    names = [[data.classes[i] for i in row] for row in indices.tolist()]
    return Images(
        [
            Image(path, best, float(value[0]), second[0] if second else None)
            for path, value, (best, *second) in zip(paths, values, names, strict=True)
        ]
    )


@torch.inference_mode()
def _probabilities(task: torch.nn.Module, data: ImageDataModule, pictures: Tensor) -> Tensor:
    return task.predict_step(data.to_input(pictures), 0)
