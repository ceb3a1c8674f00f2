"""The checkpoint of a compressed model that is small: what predictions need, with integers for rounded weights."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit._util.atomic_write import write_atomically
from lightkit.callbacks.averaged_weights import CURRENT_KEY
from lightkit.compress.packing import PACKED_KEY, memory_of, pack_weights
from lightkit.compress.weight_formats import QUANTIZATION_KEY

# Entries that only a training needs.
_OF_TRAINING = ("callbacks", "loops", "lr_schedulers", "optimizer_states", CURRENT_KEY)


def write_deployed(
    checkpoint: Mapping[str, Any], levels: Mapping[str, tuple[Tensor, Tensor]], path: Path
) -> dict[str, int]:
    """Writes the checkpoint of a compressed model without what only a training needs.

    Args:
        checkpoint: the content of a checkpoint.
        levels: what `lightkit.compress.apply_quantization` has returned for it; {} for a model in float.
        path: the file.

    Returns:
        The bytes of its tensors: see `bytes_of`.
    """
    deployed, sizes = deployed_part(checkpoint, levels)
    buffer = io.BytesIO()
    torch.save(deployed, buffer)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))
    return sizes


def deployed_part(
    checkpoint: Mapping[str, Any], levels: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns what predictions need of a checkpoint, and the bytes of its tensors: see `bytes_of`.

    Args:
        checkpoint: the content of a checkpoint.
        levels: see `write_deployed`.
    """
    deployed = {name: value for name, value in checkpoint.items() if name not in _OF_TRAINING}
    if levels:
        pack_weights(deployed, levels)
    packed = deployed[QUANTIZATION_KEY][PACKED_KEY] if levels else {}
    parts = {f"{name}.{part}": entry[part] for name, entry in packed.items() for part in ("levels", "scales")}
    return deployed, bytes_of({**deployed["state_dict"], **parts})


def bytes_of(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Returns the bytes of tensors: ``raw``, and ``zipped`` in a compressed archive; a tied weight counts once."""
    distinct = {memory_of(value): (name, value) for name, value in tensors.items() if isinstance(value, Tensor)}
    state = {name: value.detach().cpu().contiguous() for name, value in distinct.values()}
    raw = sum(value.numel() * value.element_size() for value in state.values())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, value in state.items():
            archive.writestr(name, value.flatten().view(torch.uint8).numpy().tobytes())
    return {"raw": raw, "zipped": buffer.tell()}
