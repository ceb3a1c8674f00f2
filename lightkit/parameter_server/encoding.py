"""The encoding of messages and files: JSON text and a list of tensors, without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

# The key of the dictionary that stands for a tensor in the text; its value is the tensor's index.
_TENSOR = "__tensor__"

# More than any tensor has.
_MAX_DIMENSIONS = 64

_INTEGER_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def encode(value: Any) -> tuple[bytes, list[Tensor]]:
    """Returns a value as UTF-8 JSON, and the tensors in it: detached, contiguous and on the CPU.

    Args:
        value: nested dicts, lists and tuples of strings, numbers, None and tensors of any shapes and dtypes. `decode`
            returns a tuple as a list.
    """
    tensors: list[Tensor] = []
    body = _extract_tensors(value, tensors)
    types = [[str(tensor.dtype).partition(".")[2], list(tensor.shape)] for tensor in tensors]
    return json.dumps([body, types]).encode(), tensors


def decode(text: bytes, max_bytes: int, fill: Callable[[list[Tensor]], None]) -> Any:
    """Returns the value that `encode` has encoded.

    Args:
        text: the JSON of `encode`, from an untrusted peer.
        max_bytes: the largest number of bytes of all tensors together, checked before an allocation.
        fill: a function that receives the new tensors, uninitialized, and writes their elements.

    Raises:
        ValueError: `encode` did not write such a text, or its tensors exceed ``max_bytes``.
    """
    try:
        body, types = json.loads(text)
        dtypes = [dtype_named(name) for name, _ in types]
        shapes = [checked_shape(shape) for _, shape in types]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"this is no message: {error}") from None
    required = sum(prod(shape) * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True))
    if required > max_bytes:
        raise ValueError(f"its tensors have {required} bytes, at most {max_bytes} are accepted")
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in zip(dtypes, shapes, strict=True)]
    fill(tensors)
    try:
        return _insert_tensors(body, tensors)
    except (TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"this is no message: {error}") from None


def dtype_named(name: object) -> torch.dtype:
    """Returns the dtype of torch with the name ``name``, such as ``float32``.

    Raises:
        ValueError: torch has no such dtype, or its elements are not single numbers.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex or dtype in _INTEGER_DTYPES):
        return dtype
    raise ValueError(f"{name!r} is not a dtype of numbers")


def checked_shape(shape: Any) -> list[int]:
    """Returns ``shape``, which an untrusted peer sent, after a check that it is a list of sizes.

    Raises:
        ValueError: ``shape`` is not a list of whole numbers from 0.
    """
    is_short = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    if not is_short or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise ValueError(f"{str(shape)[:100]} is not a shape")
    return shape


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor as writable bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _extract_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        return {key: _extract_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_extract_tensors(entry, tensors) for entry in value]
    return value


def _insert_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR not in value:
            return {key: _insert_tensors(entry, tensors) for key, entry in value.items()}
        if type(index := value[_TENSOR]) is not int or index < 0:
            raise TypeError(f"{str(index)[:100]} is no index of a tensor")
        return tensors[index]
    return [_insert_tensors(entry, tensors) for entry in value] if isinstance(value, list) else value
