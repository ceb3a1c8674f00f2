"""Weights in files of other programs: checkpoints, state dicts and safetensors, read as data alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.checkpoints import load_file
from lightkit.errors import CheckpointError

# The keys under which programs save a state dict, the likeliest first.
_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "model_state", "weights", "params")

_SAFETENSORS = ".safetensors"
_MAX_HEADER = 100 << 20
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; reads the file as data (``weights_only=True``).

    The file is a checkpoint of lightkit or of another program with Lightning, a state dict, a dict that has one under a
    usual key such as ``model``, or in the format of safetensors, with that suffix. Of a training with averaged weights
    the function returns the averages.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing or damaged, has no weights, or cannot be read without running its code.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a directory, expected a file of weights")
    if Path(path).suffix == _SAFETENSORS:
        return _read_safetensors(Path(path))
    try:
        content = load_file(path)
    except CheckpointError as error:
        advice = (
            "; torch.save(model.state_dict(), PATH) saves the weights alone" if "no plain data" in str(error) else ""
        )
        raise CheckpointError(f"{error}{advice}") from error
    if _is_state_dict(content):
        return _tensors(content)
    found = {key: value for key, value in content.items() if _is_state_dict(value)} if type(content) is dict else {}
    key = next((key for key in _KEYS if key in found), next(iter(found), None) if len(found) == 1 else None)
    if key is None:
        several = f"several state dicts, {', '.join(map(str, found))}" if found else "no state dict"
        raise CheckpointError(f"{path} has {printable(several)}: save the one state dict in a file of its own")
    return _tensors(found[key])


def _is_state_dict(value: Any) -> bool:
    """Returns True for a mapping of names to tensors; the extra state of a module may be anything."""
    if not isinstance(value, Mapping) or not all(type(name) is str for name in value):
        return False
    kinds = [isinstance(part, Tensor) for name, part in value.items() if not name.endswith("_extra_state")]
    return bool(kinds) and all(kinds)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file of safetensors: the length of a header, the header as JSON, and the values."""
    try:
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack_from("<Q", content)
        if not 0 < length <= min(_MAX_HEADER, len(content) - 8):
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(content[8 : 8 + length])
        return {
            name: _tensor_of(content, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not of safetensors: {printable(str(error))}") from error


def _tensor_of(content: bytearray, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    count = math.prod(shape)
    if not 0 <= begin <= end <= len(content) - start or end - begin != count * dtype.itemsize:
        raise ValueError("a tensor lies outside of the file")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return (
        torch.frombuffer(content, dtype=torch.uint8, count=end - begin, offset=start + begin)
        .clone()
        .view(dtype)
        .view(shape)
    )
