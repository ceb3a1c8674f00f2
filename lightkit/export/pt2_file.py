"""Exports in torch's own format ``.pt2``, which `torch.export.load` and AOTInductor read.

The format pickles some tensors, so that a file can run code when it is loaded: see `lightkit.export.open_export`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit.errors import CheckpointError
from lightkit.export.metadata import KEY, from_json, input_specs, to_json
from lightkit.export.runtime import InputSpec


def write(program: ExportedProgram, inputs: Sequence[InputSpec], path: Path, metadata: dict[str, Any]) -> None:
    """Writes a recorded model to one file: see `lightkit.export.export_model`."""
    from lightkit.export.recurrent import restore_torch

    restore_torch(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{KEY}.json": to_json(metadata)})
    write_atomically(path, lambda stream: stream.write(buffer.getbuffer()))


def read(path: Path) -> tuple[Pt2Runtime, dict[str, Any]]:
    """Returns the runtime and the metadata of a file: see `lightkit.export.open_export`."""
    extra = {f"{KEY}.json": ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except Exception as error:
        reason = printable(str(error).strip().partition("\n")[0])[:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no file of torch.export: {reason}") from error
    metadata = from_json(extra[f"{KEY}.json"], path)
    if not (inputs := input_specs(metadata, path)):
        raise CheckpointError(f"{path} is no export of lightkit: it does not say the form of its inputs")
    return Pt2Runtime(program, inputs), metadata


class Pt2Runtime:
    """A `Runtime` of torch's own operations.

    Args:
        program: the recorded model.
        inputs: the forms of its inputs.
    """

    def __init__(self, program: ExportedProgram, inputs: tuple[InputSpec, ...]) -> None:
        # A recorded module rejects train() and eval(), which Lightning calls; the runtime is no child of a module.
        self._module = program.module()
        self.inputs = inputs

    @torch.no_grad()
    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the output: see `lightkit.export.Runtime`."""
        return self._module(*map(torch.from_numpy, arrays)).numpy()
