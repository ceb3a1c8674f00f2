"""Classification of images: files, and those of folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.numbers import format_percentage
from lightkit._util.printable import printable
from lightkit.app.console import print_table
from lightkit.app.image_sizes import picture_size
from lightkit.app.parts import model_of
from lightkit.app.prediction.inputs import find_inputs
from lightkit.app.prediction.output import is_json, write_json, write_rows
from lightkit.app.prediction.request import PredictionRequest
from lightkit.data.image_files import ImageFormat, ImageReader
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
        classes: the names of the C classes.
        probabilities: the probabilities of the classes, ``(N, C)``.
        skipped: the reason for each file that could not be read.
        top_k: the number of the most probable classes that are shown and written; None for the default, two on the
            terminal and one in a file.
    """

    def __init__(
        self,
        images: list[ImagePrediction],
        classes: Sequence[str],
        probabilities: Tensor,
        skipped: Mapping[Path, str],
        top_k: int | None = None,
    ) -> None:
        self.images = images
        self.classes = tuple(classes)
        self.probabilities = probabilities
        self.skipped = dict(skipped)
        self.top_k = top_k

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """Returns the names and probabilities of the ``count`` most probable classes of each image."""
        values, indices = self.probabilities.topk(min(count, len(self.classes)))
        return [
            [(self.classes[index], value) for index, value in zip(row, shares, strict=True)]
            for row, shares in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def show(self) -> None:
        """Prints the first predictions."""
        rows = {}
        for image, (_, *others) in zip(self.images[:_MAX_ROWS], self.top(self.top_k or 2), strict=False):
            # The share of a second class follows from the first where only two are shown.
            shares = [f" {format_percentage(share)}" if len(others) > 1 else "" for _, share in others]
            names = [f"{printable(name)}{share}" for (name, _), share in zip(others, shares, strict=True)]
            rest = "" if self.top_k == 1 else f"; else {', '.join(names) or 'nothing'}"
            rows[str(image.path)] = f"{printable(image.label)}  ({format_percentage(image.probability)}{rest})"
        if len(self.images) > _MAX_ROWS:
            rows["..."] = f"and {len(self.images) - _MAX_ROWS} more; output=FILE.csv has them all"
        print_table("predictions", rows)

    def entries(self) -> list[dict[str, Any]]:
        """Returns a dict for each image: its path, the label, the probability, and those of all classes.

        With ``top_k`` it has the most probable classes in their order, too. A file that was skipped has its path and
        the error.
        """
        tops = self.top(self.top_k or 1)
        entries: list[dict[str, Any]] = []
        for image, shares, top in zip(self.images, self.probabilities.tolist(), tops, strict=True):
            entry: dict[str, Any] = {"path": str(image.path), "label": image.label, "probability": image.probability}
            if self.top_k is not None:
                entry["top"] = [{"label": label, "probability": share} for label, share in top]
            entries.append({**entry, "probabilities": dict(zip(self.classes, shares, strict=True))})
        return entries + [{"path": str(path), "error": reason} for path, reason in self.skipped.items()]

    def write(self, path: Path) -> None:
        """Writes all predictions: as JSON to a file whose suffix is that of JSON, else as CSV.

        A row of the CSV file has the path, the label and its probability, with ``top_k`` those of the next classes, and
        the error of a file that was skipped. The entries of a JSON file are `entries`.
        """
        if is_json(path):
            write_json(path, self.entries())
            return
        count = min(self.top_k or 1, len(self.classes))
        header = ["path", "label", "probability"]
        header += [name for place in range(2, count + 1) for name in (f"label_{place}", f"probability_{place}")]
        rows: list[list[Any]] = [
            [image.path, *(value for pair in top for value in pair), ""]
            for image, top in zip(self.images, self.top(count), strict=True)
        ]
        rows += [[place, *[""] * (2 * count), reason] for place, reason in self.skipped.items()]
        write_rows(path, [*header, "error"], rows)


def predict(
    task: pl.LightningModule, data: pl.LightningDataModule, request: PredictionRequest, state: Any = None
) -> ImagePredictions:
    """Classifies the images that an input names: see `lightkit.app.prediction.inputs.find_inputs`.

    The function skips files that cannot be read, and names them in a warning and in the predictions.

    Args:
        task: the task in evaluation mode, whose ``predict_step`` returns the probabilities of the classes.
        data: the data module of the checkpoint, which has the names of the classes.
        request: the request, of which the function reads ``input``, ``invert``, ``batch_size`` and
            ``top_k``.
        state: the state of ``data`` in the checkpoint, or None: see `lightkit.app.image_sizes.picture_size`.

    Raises:
        CheckpointError: the model and the data module have different numbers of classes, or ``state`` is wrong.
        ConfigError: an option is wrong, or the data module has no images.
        DataError: no file is an image that can be read.
    """
    batch_size = request.batch_size_or(_DEFAULT_BATCH_SIZE)
    check_options(request, data)
    paths = find_inputs(request.require_input("images"))
    if not isinstance(data, ImageDataModule):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which are not images")
    form = with_inversion(model_format(task, data, state), request)
    paths, probabilities, skipped = _predict_files(task, data, paths, form, batch_size)
    return name_classes(paths, probabilities, data, skipped, request.top_k)


def model_format(task: pl.LightningModule, data: ImageDataModule, state: Any) -> ImageFormat:
    """Returns the format of the images that the model of a checkpoint takes: see `predict` for the arguments."""
    return replace(data.image_format(), size=picture_size(data, model_of(task), state))


def with_inversion(form: ImageFormat, request: PredictionRequest) -> ImageFormat:
    """Returns a format with the inversion that a request asks for; without one, the format itself."""
    return form if request.invert is None else replace(form, invert=request.invert)


def name_classes(
    paths: Sequence[Path],
    probabilities: Tensor,
    data: ImageDataModule,
    skipped: Mapping[Path, str],
    top_k: int | None,
) -> ImagePredictions:
    """Returns predictions with the names of their classes.

    Args:
        paths: the file of each image.
        probabilities: the probabilities of the classes, ``(N, C)``.
        data: the data module, which has the names.
        skipped: see `ImagePredictions`.
        top_k: likewise.
    """
    values, indices = probabilities.topk(min(2, probabilities.shape[1]))
    names = [[data.classes[i] for i in row] for row in indices.tolist()]
    images = [
        ImagePrediction(path, best, float(value[0]), second[0] if second else None)
        for path, value, (best, *second) in zip(paths, values, names, strict=True)
    ]
    return ImagePredictions(images, data.classes, probabilities, skipped, top_k)


def check_options(request: PredictionRequest, data: Any) -> None:
    """Checks the fields ``invert`` and ``top_k`` of a request.

    Raises:
        ConfigError: one of them is wrong.
    """
    # 1 == True, so that a comparison of values would accept 1.
    if request.invert not in ("auto", None) and type(request.invert) is not bool:
        raise ConfigError(f"invert must be auto, true or false, got {request.invert!r}")
    top_k, most = request.top_k, getattr(data, "num_classes", None)
    if top_k is not None and most is not None and not 1 <= top_k <= most:
        raise ConfigError(f"top_k must be from 1 to {most}, the number of classes, got {top_k}")


def _predict_files(
    task: Any, data: ImageDataModule, paths: Sequence[Path], form: ImageFormat, batch_size: int
) -> tuple[list[Path], Tensor, dict[Path, str]]:
    """Returns the files that could be read, their probabilities ``(N, C)``, and the reason for each other file.

    The images of no more than some batches are held in memory.
    """
    reader = ImageReader(form)
    kept: list[Path] = []
    probabilities: list[Tensor] = []
    for begin in range(0, len(paths), batch_size):
        read, pictures = reader.read(paths[begin : begin + batch_size])
        kept += read
        probabilities += [classify(task, data, pictures)] if read else []
    reader.warn()
    return kept, torch.cat(probabilities), {path: str(error) for path, error in reader.problems.items()}


@torch.inference_mode()
def classify(task: pl.LightningModule, data: ImageDataModule, pictures: Tensor) -> Tensor:
    """Returns the probabilities of the classes of images.

    Args:
        task: the task in evaluation mode.
        data: the data module, which preprocesses the images.
        pictures: the images, uint8 ``(N, H, W)`` or ``(N, C, H, W)``; the model computes on their device.

    Returns:
        The probabilities ``(N, classes)``.

    Raises:
        CheckpointError: the model and the data module have different numbers of classes.
        ConfigError: ``predict_step`` of a user's task returns something else, such as logits.
    """
    found = task.predict_step(data.to_input(pictures), 0)
    if not isinstance(task, ClassificationTask) and not _is_distribution(found, len(pictures)):
        kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(
            f"predict needs a predict_step of {type(task).__name__} that returns the probabilities of the classes for "
            f"a tensor of images, a tensor ({len(pictures)}, classes) of rows whose sum is 1; it returns {kind}"
        )
    if found.shape[1] != data.num_classes:
        raise CheckpointError(
            f"the model of the checkpoint tells {found.shape[1]} classes apart, and its data have {data.num_classes}"
        )
    return found


def _is_distribution(found: Any, count: int) -> bool:
    """Returns True if ``found`` is a tensor of ``count`` rows, each of which has nonnegative values of the sum 1."""
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != count or not found.is_floating_point():
        return False
    sums = found.double().sum(dim=1)
    return bool((found >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
