"""Comparison of the size of the images that a data module serves with the size that a model takes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightkit.data import ImageDataModule
from lightkit.errors import CheckpointError, ConfigError
from lightkit.export import ExportedModel
from lightkit.export.runtime import LENGTH
from lightkit.models import CNN, RNN, Ensemble

# The limit of a height and of a width that a checkpoint gives.
_MAX_SIDE = 1024


def check_image_size(data: pl.LightningDataModule, model: nn.Module | None, is_trained: bool = False) -> None:
    """Rejects images of another size than a model of lightkit takes; reads no more than the headers of the data.

    Args:
        data: the data module; one that does not derive from `ImageDataModule` is accepted.
        model: the model; one that is no `CNN`, `RNN` or export is accepted, since nothing is known of its input.
            None stands for a task without a model.
        is_trained: True if the model is that of a checkpoint, whose size no key can change.

    Raises:
        ConfigError: the sizes differ; the message has both, and the key that helps.
        DataError: the data module cannot find its files, or its images have different sizes.
    """
    known = (CNN, RNN, ExportedModel)
    if not isinstance(data, ImageDataModule) or _converts_itself(data) or not isinstance(model, known):
        return
    height, width = data.image_shape()
    served = tuple(data.to_input(torch.empty(1, *data.stored_shape(), dtype=torch.uint8)).shape[1:])
    if isinstance(model, ExportedModel):
        sizes = model.runtime.inputs[0].shape[1:]
        expected = " x ".join(map(str, sizes))
        fits = len(served) == len(sizes) and all(b in (a, LENGTH) for a, b in zip(served, sizes, strict=True))
        problem = None if fits else "another size"
    elif isinstance(model, CNN):
        expected, problem = f"{model.image_shape[1]} x {model.image_shape[2]}", _cnn_problem(served, model.image_shape)
    else:
        expected, problem = f"rows of {model.input_size}", _rnn_problem(served, model.input_size)
    if problem and is_trained:
        raise ConfigError(
            f"the images of {type(data).__name__} are {height} x {width} pixels, and the model of the checkpoint takes "
            f"{expected}"
        )
    if problem:
        raise ConfigError(problem)


def picture_size(data: ImageDataModule, model: nn.Module | None, state: Any) -> tuple[int, int]:
    """Returns height and width of the pictures that the model of a checkpoint takes.

    Args:
        data: the data module of the checkpoint, which has read no data.
        model: the model; None for a task without a model.
        state: the state of ``data`` in the checkpoint, of any type; None if the checkpoint has none.

    Raises:
        CheckpointError: ``state`` has no valid size, or the members of an `Ensemble` take different sizes.
    """
    if isinstance(model, Ensemble):
        sizes = {picture_size(data, member, state) for member in model.models}
        if len(sizes) > 1:
            shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise CheckpointError(f"the models of the ensemble take pictures of different sizes: {shown}")
        return sizes.pop()
    stored = None if state is None else _stored_size(state)
    if isinstance(model, CNN) and not _converts_itself(data):
        return model.image_shape[1:]
    if isinstance(model, RNN) and not _converts_itself(data):
        # The model does not say how many rows its images had. Checkpoints of earlier versions have no state.
        width = model.input_size // data.channels
        return width if stored is None else stored[0], width
    return data.image_shape() if stored is None else stored


def _converts_itself(data: ImageDataModule) -> bool:
    """Returns True if the class of ``data`` makes inputs of another size than its images may have."""
    return any(
        getattr(type(data), name) is not getattr(ImageDataModule, name)
        for name in ("to_input", "on_after_batch_transfer")
    )


def _cnn_problem(served: tuple[int, ...], expected: tuple[int, int, int]) -> str | None:
    """Returns what is wrong with images of the shape ``served`` for a `CNN` that takes ``expected``, or None."""
    if served == expected:
        return None
    if len(served) != 3:
        return "data.layout=rows serves sequences of rows, and CNN takes images: set data.layout=image"
    channels, height, width = served
    if channels != expected[0]:
        count = "1 channel" if channels == 1 else f"{channels} channels"
        return f"the images have {count}, but model.in_channels is {expected[0]}: leave model.in_channels out"
    size = expected[1] if expected[1] == expected[2] else list(expected[1:])
    return (
        f"the images are {height} x {width} pixels (height x width), but model.image_size is {size}: leave "
        "model.image_size out"
    )


def _rnn_problem(served: tuple[int, ...], input_size: int) -> str | None:
    """Returns what is wrong with inputs of the shape ``served`` for an `RNN` that takes ``input_size``, or None."""
    if len(served) != 2:
        return "data.layout=image serves images, and RNN takes sequences of rows: set data.layout=rows"
    rows, values = served
    if values == input_size:
        return None
    return (
        f"the images have {rows} rows of {values} values, but model.input_size is {input_size}: leave model.input_size "
        "out"
    )


def _stored_size(state: Any) -> tuple[int, int]:
    size = state.get("image_shape") if type(state) is dict else None
    if type(size) is not list or len(size) != 2 or any(type(n) is not int or not 0 < n <= _MAX_SIDE for n in size):
        raise CheckpointError(
            f"the checkpoint does not say the size of its images: expected two numbers from 1 to {_MAX_SIDE}"
        )
    return size[0], size[1]
