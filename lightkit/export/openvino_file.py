"""Exports in the format of OpenVINO, an ``.xml`` file of operations and a ``.bin`` file of weights beside it.

Nobody promises that OpenVINO's reader withstands files that were made to deceive it: see `lightkit.export.open_export`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightkit._util.printable import printable
from lightkit.errors import CheckpointError
from lightkit.export.metadata import KEY, from_json, input_specs, to_json
from lightkit.export.onnx_file import to_onnx
from lightkit.export.runtime import InputSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def write(program: ExportedProgram, inputs: Sequence[InputSpec], path: Path, metadata: dict[str, Any]) -> None:
    """Writes a recorded model, converted from ONNX, to two files: see `lightkit.export.export_model`."""
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino.convert_model(io.BytesIO(to_onnx(program, inputs).SerializeToString()))
    model.set_rt_info(to_json(metadata), [KEY])
    # By default the weights would be rounded to float16.
    openvino.save_model(model, str(path), compress_to_fp16=False)


def read(path: Path) -> tuple[OpenVinoRuntime, dict[str, Any]]:
    """Returns the runtime and the metadata of a file: see `lightkit.export.open_export`."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ""
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no model of OpenVINO: {_reason(error)}") from error
    metadata = from_json(text, path)
    if not (inputs := input_specs(metadata, path)):
        raise CheckpointError(f"{path} is no export of lightkit: it does not say the form of its inputs")
    # OpenVINO would compute in bfloat16 on a processor that has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        return OpenVinoRuntime(core.compile_model(model, "CPU", settings), inputs), metadata
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be run by OpenVINO: {_reason(error)}") from error


class OpenVinoRuntime:
    """A `Runtime` of OpenVINO on the CPU, with as many threads as torch has.

    Args:
        model: the compiled model.
        inputs: the forms of its inputs.
    """

    def __init__(self, model: Any, inputs: tuple[InputSpec, ...]) -> None:
        self._model = model
        self.inputs = inputs

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the first output: see `lightkit.export.Runtime`."""
        # A copy: the next call writes into the same memory.
        return np.array(self._model(list(arrays))[0])


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line and not line.startswith("Exception from")]
    return printable(lines[0])[:200] if lines else type(error).__name__
