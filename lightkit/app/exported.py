"""An export of a stranger as a checkpoint: its model, its configuration and the tensors of its task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightkit._util.printable import printable
from lightkit.checkpoints import CONFIG_KEY
from lightkit.errors import CheckpointError
from lightkit.export import ExportedLanguageModel, ExportedModel, Runtime, open_export

_DTYPES = ("float32", "float64", "int64")

# The limit of the tensors of a task, such as the weights of the classes and the widths of intervals.
_MAX_VALUES = 1_000_000

_LANGUAGE_MODEL = "lightkit.tasks.LanguageModelTask"


def read_export(path: Path, trust: bool) -> tuple[dict[str, Any], nn.Module]:
    """Returns the content of an export in the form of a checkpoint's, and its model.

    Args:
        path: the file, which may come from an untrusted source.
        trust: as in `lightkit.export.open_export`.

    Raises:
        CheckpointError: the file cannot be used: see `lightkit.export.open_export`; or it is no export of lightkit.
    """
    runtime, metadata = open_export(path, trust)
    config, state, buffers = (metadata.get(name) for name in ("config", "state", "buffers"))
    if type(config) is not dict or type(config.get("task")) is not dict:
        raise CheckpointError(f"{path} has no configuration: lightkit.export did not write it")
    if type(state) is not dict or type(buffers) is not dict:
        raise CheckpointError(f"{path}: its metadata lack the state of the data or the tensors of the task")
    checkpoint = {**state, CONFIG_KEY: config, "state_dict": _decode_buffers(buffers, path)}
    is_language_model = config["task"].get("_target_") == _LANGUAGE_MODEL
    return checkpoint, _language_model(runtime, path) if is_language_model else ExportedModel(runtime)


def encode_buffers(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns tensors as plain values for JSON, which has no infinite numbers: these are texts."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "values": [
                value if isinstance(value, int) or math.isfinite(value) else str(value)
                for value in tensor.flatten().tolist()
            ],
        }
        for name, tensor in tensors.items()
    }


def _decode_buffers(node: dict[str, Any], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, part in node.items():
        try:
            dtype, shape, values = part["dtype"], part["shape"], part["values"]
            if dtype not in _DTYPES or type(values) is not list or len(values) > _MAX_VALUES:
                raise ValueError("it has another dtype, or too many values")
            convert = int if dtype == "int64" else float
            array = np.array([convert(value) for value in values], dtype=dtype).reshape([int(size) for size in shape])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: {printable(name[:100])} of its metadata is no tensor") from error
        tensors[name] = torch.from_numpy(array)
    return tensors


def _language_model(runtime: Runtime, path: Path) -> nn.Module:
    spec, *others = runtime.inputs
    if others or spec.dtype != "int64" or len(spec.shape) != 2:
        raise CheckpointError(f"{path} is no language model: it takes no tokens (batch, length)")
    try:
        length = spec.shape[1] if isinstance(spec.shape[1], int) else 1
        logits = runtime.run([np.zeros((1, length), dtype=np.int64)])
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be run: {printable(str(error))}") from error
    if logits.ndim != 3:
        raise CheckpointError(f"{path} is no language model: it returns {logits.shape} for one token")
    return ExportedLanguageModel(runtime, logits.shape[2])
