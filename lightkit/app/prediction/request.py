"""What a prediction is asked for, beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PredictionRequest:
    """The keys of ``conf/predict.yaml`` that say what to predict; None leaves the choice to the kind of task.

    Args:
        input: the file or folder of images, the CSV file, or the file of text.
        invert: for images: dark on light becomes light on dark; ``"auto"`` decides by the border.
        batch_size: for images: classified at a time.
        column: for a series: the column of the CSV file.
        horizon: for a series: the number of steps to forecast.
        text: for text: the text to continue, instead of ``input``.
        length: for text: the number of bytes to add.
        temperature: for text: of the sampling; 0 takes the likeliest byte.
        top_k: for text: sample among the likeliest bytes only.
        seed: for text: of the sampling.
    """

    input: str | None = None
    invert: bool | Literal["auto"] | None = None
    batch_size: int | None = None
    column: str | None = None
    horizon: int | None = None
    text: str | None = None
    length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    seed: int | None = None
