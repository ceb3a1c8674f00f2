"""The interface of a runtime: a model that maps arrays to an array, and the form of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# The names of the dimensions that are free.
BATCH, LENGTH = "batch", "length"

# The dtypes of inputs: numbers, and tokens or categories.
DTYPES = ("float32", "int64")


@dataclass(frozen=True)
class InputSpec:
    """The form of an input of a model.

    Args:
        name: the name of the input.
        dtype: ``"float32"`` or ``"int64"``.
        shape: the size of each dimension; a free dimension has a name, ``"batch"`` for the first one and ``"length"``
            for the number of steps or tokens.
        max_length: the largest length; None for no limit.

    Raises:
        ValueError: an argument is none of these.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of the input {self.name!r} must be {' or '.join(DTYPES)}, got {self.dtype!r}")
        if not self.shape or self.shape[0] != BATCH or any(isinstance(n, str) and n != LENGTH for n in self.shape[1:]):
            raise ValueError(
                f"shape of the input {self.name!r} must be ({BATCH!r}, sizes or {LENGTH!r} ...), got {self.shape}"
            )

    def check(self, array: np.ndarray) -> np.ndarray:
        """Returns ``array`` with the dtype of the input.

        Raises:
            ValueError: the shape is another one.
        """
        fits = array.ndim == len(self.shape) and all(
            size == expected or isinstance(expected, str)
            for size, expected in zip(array.shape, self.shape, strict=True)
        )
        if not fits or 0 in array.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"the export takes {self.name} of shape ({expected}), got {array.shape}")
        if self.max_length is not None and array.shape[self.shape.index(LENGTH)] > self.max_length:
            raise ValueError(f"the export takes a {LENGTH} of at most {self.max_length}, got {array.shape}")
        return np.ascontiguousarray(array, dtype=self.dtype)


class Runtime(Protocol):
    """A model in a file, ready to run on a CPU.

    Attributes:
        inputs: the forms of the inputs in their order.
    """

    inputs: tuple[InputSpec, ...]

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the output of the model, floating point ``(N, ...)``, such as logits.

        Args:
            arrays: an array for each of ``inputs``, which `InputSpec.check` has checked.

        Raises:
            RuntimeError: the file does not compute what it declares.
        """
        ...
