"""``python -m lightkit.predict ckpt_path=... input=...``: classify images with a checkpoint."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from lightkit import results
from lightkit.cli import entry_point
from lightkit.data.images import to_input
from lightkit.data.pictures import find_pictures, read_picture
from lightkit.errors import ConfigError
from lightkit.job import build_data, restore

# How many predictions the terminal shows; a file gets all.
_SHOWN = 20


@dataclass(frozen=True)
class Prediction:
    """The class of one image, and how sure the model is of it."""

    path: Path
    label: str
    probability: float
    second: str | None


@entry_point("predict")
def main(config: DictConfig) -> None:
    """Classifies images and prints what they are."""
    results.check_output(config.output)
    predictions = predict(config)
    rows = {
        str(p.path): f"{p.label}  ({p.probability:.1%}; else {p.second or 'nothing'})" for p in predictions[:_SHOWN]
    }
    if len(predictions) > _SHOWN:
        rows["..."] = f"and {len(predictions) - _SHOWN} more; output=FILE.csv has them all"
    results.print_table("predictions", rows)
    if config.output is not None:
        with open(config.output, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "probability"])
            writer.writerows([p.path, p.label, p.probability] for p in predictions)


def predict(config: DictConfig) -> list[Prediction]:
    """Classifies one image, or every image of a folder in the order of their names."""
    if config.invert not in ("auto", True, False):
        raise ConfigError(f"invert must be auto, true or false, got {config.invert!r}")
    if config.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {config.batch_size}")
    restored = restore(config.ckpt_path)
    paths = find_pictures(Path(config.input))
    data = build_data(restored.config)
    size = data.image_size
    pictures = torch.stack([read_picture(path, size, config.invert) for path in paths])
    probabilities = torch.cat([_probabilities(restored.task, chunk) for chunk in pictures.split(config.batch_size)])
    values, indices = probabilities.topk(min(2, probabilities.shape[1]))
    names = [[data.classes[i] for i in row] for row in indices.tolist()]
    return [
        Prediction(path, best, float(value[0]), second[0] if second else None)
        for path, value, (best, *second) in zip(paths, values, names, strict=True)
    ]


@torch.inference_mode()
def _probabilities(task: torch.nn.Module, pictures: Tensor) -> Tensor:
    return task.predict_step(to_input(pictures), 0)


if __name__ == "__main__":
    sys.exit(main())
