"""Arrays: the samples of a model that `lightkit.fit` has trained on arrays, as nested lists."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightkit.app.serving.bodies import is_json, one_of, read_object, shown, take_options
from lightkit.app.serving.kinds.kind import Kind
from lightkit.app.serving.messages import Request, RequestError
from lightkit.data.arrays import DataModule, are_texts
from lightkit.tasks import ClassificationTask
from lightkit.tasks.batch_prediction import predict_batch

_DTYPES = {"uint8": np.uint8, "float": np.float32, "int": np.int64}


class Arrays(Kind):
    """Samples as nested lists of numbers, or texts of a model of tokens.

    Args:
        task: the task in evaluation mode.
        data: the data module, which has the form of the arrays.
    """

    name = "arrays"

    def __init__(self, task: pl.LightningModule, data: DataModule) -> None:
        self._task = task
        self._data = data

    def about(self) -> dict[str, Any]:
        """Returns the shape and the dtype of a sample, and the names of the classes."""
        form, classes = self._data.format, self._data.classes
        return {
            "input": {"shape": list(form.shape), "dtype": form.dtype},
            "classes": None if classes is None else list(classes),
        }

    def content_schema(self) -> dict[str, Any]:
        """Returns the schema of the samples."""
        form = self._data.format
        shape = ", ".join(map(str, form.shape))
        kind = {"uint8": "numbers from 0 to 255", "float": "numbers", "int": "tokens"}[form.dtype]
        description = f"The samples, nested lists of the shape (N, {shape}) of {kind}."
        return {"x": {"type": "array", "items": {}, "description": description}}

    def example(self) -> dict[str, Any]:
        """Returns a sample of zeros."""
        return {"x": np.zeros((1, *self._data.format.shape), dtype=int).tolist()}

    def decode(self, request: Request) -> Tensor:
        """Returns the samples of a request, ``(N, ...)``: see `Kind.decode`."""
        if not is_json(request, self.media_types):
            raise RequestError(415, "Content-Type must be application/json: the samples are nested lists")
        fields = read_object(request.body)
        one_of(fields, ("x",))
        take_options(fields, request.query, tuple(self.options), ("x",))
        x = fields["x"]
        if not are_texts(x):
            x = self._to_array(x)
        (inputs,) = self._data.encode(x)
        return inputs

    def _to_array(self, x: Any) -> np.ndarray:
        if not isinstance(x, list):
            raise RequestError(400, f"x must be nested lists of numbers, got {shown(x)}")
        try:
            array = np.array(x)
        except ValueError as error:
            raise RequestError(400, "x must be nested lists of numbers, got lists of different lengths") from error
        # JSON does not tell 1 from 1.0, and has no dtypes: those of the training count.
        dtype = _DTYPES[self._data.format.dtype]
        if array.dtype.kind not in ("iuf" if dtype is np.float32 else "iu"):
            expected = "numbers" if dtype is np.float32 else "whole numbers"
            raise RequestError(400, f"x must be nested lists of {expected}, got other values")
        if dtype is np.uint8 and array.size and (array.min() < 0 or array.max() > 255):
            wrong = array.min() if array.min() < 0 else array.max()
            raise RequestError(400, f"x must have numbers from 0 to 255, got {wrong}")
        # A number beyond float32 becomes infinite, which the data module rejects.
        with np.errstate(over="ignore"):
            return array.astype(dtype)

    @torch.inference_mode()
    def predict(self, samples: list[Tensor]) -> list[Tensor]:
        """Returns the outputs for the samples of each request, ``(N, ...)``."""
        outputs = predict_batch(self._task, self._data.to_input(torch.cat(samples))).cpu()
        return list(outputs.split([len(sample) for sample in samples]))

    def encode(self, sample: Tensor, output: Tensor) -> dict[str, Any]:
        """Returns the probabilities of the classes and the most probable one of each sample, or its values."""
        classes = self._data.classes
        if classes is None or not isinstance(self._task, ClassificationTask):
            return {"predictions": output.tolist()}
        best = output.argmax(dim=1).tolist()
        return {
            "predictions": [
                {
                    "label": classes[index],
                    "probability": row[index],
                    "probabilities": dict(zip(classes, row, strict=True)),
                }
                for index, row in zip(best, output.tolist(), strict=True)
            ]
        }
