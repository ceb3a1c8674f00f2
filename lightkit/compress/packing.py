"""The rounded weights of a quantized model in a small file: integers of few bits, and their scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.compress.weight_formats import QUANTIZATION_KEY, largest_level
from lightkit.errors import CheckpointError

# The entry of a quantization in a checkpoint with packed weights:
# {"model.features.0.weight": {"shape": [32, 1, 3, 3], "levels": uint8 tensor, "scales": float32 tensor}}.
# The entry of a weight with several names has the others under "tied".
PACKED_KEY = "packed"


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Returns integer levels in ``bits`` bits each, without gaps, as uint8.

    A level l is stored as ``l + qmax``, and one of 2 bits, which is odd, as ``(l + 3) / 2``.

    Args:
        levels: int8 of any shape, from ``-qmax`` to ``qmax``.
        bits: 2, 3, 4 or 8.
    """
    codes = levels.flatten().to(torch.int16) + largest_level(bits)
    codes = codes // 2 if bits == 2 else codes
    spread = np.unpackbits(codes.to(torch.uint8).numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(spread))


def unpack_levels(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns the levels that `pack_levels` has packed, int8 ``(count,)``."""
    spread = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(np.pad(spread, ((0, 0), (8 - bits, 0))), axis=1)[:, 0].astype(np.int16)
    codes = codes * 2 if bits == 2 else codes
    return torch.from_numpy((codes - largest_level(bits)).astype(np.int8))


def pack_weights(checkpoint: dict[str, Any], levels: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Replaces the weights in the state dict of a checkpoint by their integers, under all names of tied weights.

    Args:
        checkpoint: the content of a checkpoint of a quantized model, which the function changes.
        levels: the levels, int8 of the weight's shape, and the scales, float32, of each weight by name.
    """
    spec = checkpoint[QUANTIZATION_KEY]
    state = dict(checkpoint["state_dict"])
    packed = {}
    for name, (integers, scales) in levels.items():
        memory = memory_of(state.pop(name))
        tied = [
            other
            for other, value in state.items()
            if isinstance(value, Tensor) and value.shape == integers.shape and memory_of(value) == memory
        ]
        bits, _ = spec["weights"][name]
        packed[name] = packed_entry(integers, scales, bits) | ({"tied": tied} if tied else {})
        for other in tied:
            del state[other]
    checkpoint["state_dict"] = state
    checkpoint[QUANTIZATION_KEY] = {**spec, PACKED_KEY: packed}


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Returns a value that tensors have in common if they are the same view of the same memory, as tied weights are."""
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def packed_entry(levels: Tensor, scales: Tensor, bits: int) -> dict[str, Any]:
    """Returns the entry of a weight under `PACKED_KEY`.

    Args:
        levels: int8 of the weight's shape.
        scales: float32 ``(rows,)``.
        bits: the bits of the weight.
    """
    return {"shape": list(levels.shape), "levels": pack_levels(levels, bits), "scales": scales.float().cpu()}


def unpack_weights(checkpoint: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the levels and scales of the packed weights of a checkpoint, which is not trusted; {} without any.

    Raises:
        CheckpointError: the entry is damaged.
    """
    spec = checkpoint.get(QUANTIZATION_KEY)
    packed = spec.get(PACKED_KEY, {}) if type(spec) is dict else {}
    formats = spec.get("weights") if type(spec) is dict else {}
    if type(packed) is not dict or type(formats) is not dict:
        raise CheckpointError("the quantization of the checkpoint is damaged")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    storages: set[int] = set()
    for name, entry in packed.items():
        try:
            bits, group_size = formats[name]
            shape = [int(size) for size in entry["shape"]]
            levels, scales = entry["levels"], entry["scales"]
            largest_level(bits)
            # The bytes of the file limit what a stranger's shapes may allocate: a tensor without strides and a storage
            # of its own has as many bytes as it says.
            storage = levels.untyped_storage().data_ptr()
            if not (levels.is_contiguous() and scales.is_contiguous()) or storage in storages:
                raise ValueError("the strides")
            storages.add(storage)
            count = 1
            for size in shape:
                count *= size
                if size < 1 or count * bits > levels.numel() * 8:
                    raise ValueError("the shape")
            if group_size and count % group_size:
                raise ValueError("the groups")
            rows = count // group_size if group_size else shape[0]
            are_tensors = levels.dtype == torch.uint8 and scales.dtype == torch.float32 and levels.dim() == 1
            if len(shape) < 2 or not are_tensors or levels.numel() != -(-count * bits // 8) or scales.shape != (rows,):
                raise ValueError("the sizes")
            if not bool((scales.isfinite() & (scales > 0)).all()):
                raise ValueError("the scales")
            integers = unpack_levels(levels, bits, count).view(shape)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shown = printable(str(name)[:100])
            raise CheckpointError(f"the packed weights of the checkpoint are damaged: {shown}") from error
        found[name] = integers, scales
    return found


def packed_shapes(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns a tensor without memory, on the meta device, of the shape of each packed weight, which is not checked.

    Raises:
        CheckpointError: an entry has no shape, or wrong names.
    """
    spec = checkpoint.get(QUANTIZATION_KEY)
    packed = spec.get(PACKED_KEY) if type(spec) is dict else None
    try:
        shapes = {name: torch.empty(entry["shape"], device="meta") for name, entry in (packed or {}).items()}
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError("the packed weights of the checkpoint are damaged") from error
    return _with_tied_names(checkpoint, shapes)


def _with_tied_names(checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of packed weights under all names of each weight.

    Args:
        checkpoint: the content of the checkpoint, which is not trusted.
        tensors: a tensor for each entry under `PACKED_KEY`, by name.

    Raises:
        CheckpointError: a name is no string, or that of another weight.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        entry = checkpoint[QUANTIZATION_KEY][PACKED_KEY][name]
        tied = entry.get("tied", []) if type(entry) is dict else None
        for other in tied if type(tied) is list else [None]:
            if type(other) is not str or other in found or other in checkpoint["state_dict"]:
                shown = printable(str(name)[:100])
                raise CheckpointError(f"the packed weights of the checkpoint are damaged: {shown}")
            found[other] = tensor
    return found


def weight_of(levels: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight of integer levels, float32 of their shape.

    Args:
        levels: int8; its rows, or equal parts of them, have one scale each.
        scales: float32 ``(rows,)`` or as many as there are parts.
    """
    return (levels.reshape(len(scales), -1) * scales[:, None]).view(levels.shape)


def unpacked_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the packed weights of a checkpoint, which is not trusted, by all names of each; {} without any.

    Raises:
        CheckpointError: an entry is damaged.
    """
    weights = {name: weight_of(*packed) for name, packed in unpack_weights(checkpoint).items()}
    return _with_tied_names(checkpoint, weights)
