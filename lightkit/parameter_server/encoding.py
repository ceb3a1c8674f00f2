"""JSON with tensors in it, as text and tensors: what messages and files are made of. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

# The key of the dictionary that stands for a tensor in the text; its value is the tensor's position.
_TENSOR = "__tensor__"

# More than any tensor has.
_MOST_DIMENSIONS = 64

_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def encode(value: Any) -> tuple[bytes, list[Tensor]]:
    """Returns a value as UTF-8 JSON and the tensors in it, detached, on the CPU, without gaps.

    Args:
        value: containers, strings, numbers and None, with tensors of any shapes and dtypes; tuples come back as lists.
    """
    tensors: list[Tensor] = []
    described = _take_out(value, tensors)
    forms = [[str(tensor.dtype).partition(".")[2], list(tensor.shape)] for tensor in tensors]
    return json.dumps([described, forms]).encode(), tensors


def decode(text: bytes, most: int, fill: Callable[[list[Tensor]], None]) -> Any:
    """Returns the value that `encode` was given.

    Args:
        text: the JSON, of whoever sent it: it may be anything.
        most: bytes that its tensors may take together; nothing is allocated where they would take more.
        fill: gets the tensors, empty, and writes their elements.

    Raises:
        ValueError: the text is not one of `encode`, or announces more than `most` bytes.
    """
    try:
        described, forms = json.loads(text)
        dtypes = [dtype_named(name) for name, _ in forms]
        shapes = [checked_shape(shape) for _, shape in forms]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"this is no message: {error}") from None
    needed = sum(prod(shape) * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True))
    if needed > most:
        raise ValueError(f"tensors of {needed} bytes are announced, at most {most} are taken")
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in zip(dtypes, shapes, strict=True)]
    fill(tensors)
    try:
        return _put_back(described, tensors)
    except (TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"this is no message: {error}") from None


def dtype_named(name: Any) -> torch.dtype:
    """Returns the dtype of that name.

    Raises:
        ValueError: there is none whose elements are single numbers.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    known = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex or dtype in _WHOLE)
    if not known:
        raise ValueError(f"{name!r} is not a dtype of numbers")
    return dtype


def checked_shape(shape: Any) -> list[int]:
    """Returns a shape that somebody else has sent.

    Raises:
        ValueError: it is not a list of sizes.
    """
    good = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
    if not good or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise ValueError(f"{str(shape)[:100]} is not a shape")
    return shape


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a tensor on the CPU without gaps, to be read or written."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        return {key: _take_out(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(entry, tensors) for entry in value]
    return value


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR not in value:
            return {key: _put_back(entry, tensors) for key, entry in value.items()}
        if type(position := value[_TENSOR]) is not int or position < 0:
            raise TypeError(f"{str(position)[:100]} is no position of a tensor")
        return tensors[position]
    return [_put_back(entry, tensors) for entry in value] if isinstance(value, list) else value
