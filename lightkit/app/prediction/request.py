"""The input and the options of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightkit.errors import ConfigError


@dataclass(frozen=True)
class PredictionRequest:
    """The input and the options of a prediction, which are keys of ``conf/predict.yaml``.

    An option that is None has the default of the task. The word before each description names the kind of input.

    Args:
        input: the file or folder of images, the CSV file of a series, or the file of a text.
        invert: images: invert the brightness; ``"auto"`` inverts an image of another size with a bright border.
        batch_size: images: the number of images in a batch.
        column: series: the column of the CSV file.
        horizon: series: the number of steps to forecast.
        text: text: the text to continue, instead of ``input``.
        length: text: the number of bytes to add.
        temperature: text: the sampling temperature; 0 takes the most probable byte.
        top_k: text: the number of most probable bytes to sample from.
        seed: text: the seed of the sampling.
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

    def require_input(self, kind: str) -> str:
        """Returns ``input`` after a check that it is given.

        Args:
            kind: the kind of input for the message, such as ``images``.

        Raises:
            ConfigError: ``input`` is None.
        """
        if self.input is None:
            raise ConfigError(f"input=PATH must say which {kind} the prediction is for")
        return self.input
