"""Exports in the format of ExecuTorch, for phones and boards: a ``.pte`` file, and its metadata in a ``.json`` file.

The file runs one sample at a time, of a fixed length, with the kernels of XNNPACK. Nobody promises that ExecuTorch's
reader withstands files that were made to deceive it: see `lightkit.export.open_export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightkit._util.atomic_write import write_atomically, write_text_atomically
from lightkit._util.printable import printable
from lightkit.errors import CheckpointError, ConfigError
from lightkit.export.metadata import from_json, input_specs, to_json
from lightkit.export.runtime import InputSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def write(program: ExportedProgram, inputs: Sequence[InputSpec], path: Path, metadata: dict[str, Any]) -> None:
    """Writes a model that is recorded for one sample: see `lightkit.export.export_model`."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    if any(isinstance(size, str) for spec in inputs for size in spec.shape[1:]):
        raise ConfigError("format=executorch takes inputs of a fixed length alone")
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    write_text_atomically(path.with_suffix(".json"), to_json(metadata))
    write_atomically(path, lambda stream: stream.write(lowered.buffer))


def read(path: Path) -> tuple[ExecuTorchRuntime, dict[str, Any]]:
    """Returns the runtime and the metadata of a file: see `lightkit.export.open_export`."""
    from executorch.runtime import Runtime as Engine  # pyright: ignore[reportMissingImports]

    companion = path.with_suffix(".json")
    if not companion.is_file():
        raise CheckpointError(f"{path} lacks {companion.name} beside it, which says the form of its inputs")
    try:
        program = Engine.get().load_program(path.read_bytes())
        method = program.load_method("forward")
    except RuntimeError as error:
        reason = printable(str(error).strip().partition("\n")[0])[:200]
        raise CheckpointError(f"{path} is damaged or no program of ExecuTorch: {reason}") from error
    metadata = from_json(companion.read_text(errors="replace"), companion)
    if not (inputs := input_specs(metadata, companion)):
        raise CheckpointError(f"{companion} does not say the form of the inputs of {path.name}")
    return ExecuTorchRuntime(program, method, inputs), metadata


class ExecuTorchRuntime:
    """A `Runtime` of ExecuTorch, which runs the samples of a batch one after the other.

    Args:
        program: the loaded program, which the runtime keeps alive.
        method: its method ``forward``.
        inputs: the forms of its inputs.
    """

    def __init__(self, program: Any, method: Any, inputs: tuple[InputSpec, ...]) -> None:
        self._program, self._method = program, method
        self.inputs = inputs

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the first output: see `lightkit.export.Runtime`."""
        tensors = [torch.from_numpy(array) for array in arrays]
        # A copy of each: the next call writes into the same memory.
        outputs = [
            self._method.execute([tensor[index : index + 1].contiguous() for tensor in tensors])[0].clone()
            for index in range(len(tensors[0]))
        ]
        return torch.cat(outputs).numpy()
