"""Exports in the format ONNX, which ONNX Runtime runs [1]_.

A file of a stranger makes ONNX Runtime compute, and nothing else: `read` rejects weights in other files, functions,
operators with a graph within, such as loops, and operators of other domains than ONNX's own.

References:
    .. [1] https://onnx.ai/onnx/repo-docs/IR.html
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from lightkit import __version__
from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.errors import CheckpointError, ConfigError, DataError
from lightkit.export.metadata import KEY, from_json, input_specs, to_json
from lightkit.export.runtime import BATCH, LENGTH, InputSpec
from lightkit.native.target import processor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# The limit of a file of protocol buffers.
_MAX_BYTES = (1 << 31) - 1

# The fields with where an operation came from: source lines, and names of classes.
_ORIGINS = ("doc_string", "metadata_props")

# The name of the checksum of the weights in a file.
_CHECKSUM = "lightkit_weights_sha256"

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}

# The dtypes that a tensor of an export may have, and the bytes of a value.
_ITEM_SIZES = {
    getattr(onnx.TensorProto, name): size
    for size, names in {
        1: ("INT8", "UINT8", "BOOL"),
        2: ("FLOAT16", "BFLOAT16"),
        4: ("FLOAT", "INT32"),
        8: ("DOUBLE", "INT64"),
    }.items()
    for name in names
}

# Errors only.
_LOG_SEVERITY = 4


def write(program: ExportedProgram, inputs: Sequence[InputSpec], path: Path, metadata: dict[str, Any]) -> None:
    """Writes a recorded model to one ONNX file: see `lightkit.export.export_model`."""
    model = to_onnx(program, inputs)
    for key, text in {KEY: to_json(metadata), _CHECKSUM: _checksum(model)}.items():
        model.metadata_props.add(key=key, value=text)
    content = model.SerializeToString()
    write_atomically(path, lambda stream: stream.write(content))


def to_onnx(program: ExportedProgram, inputs: Sequence[InputSpec]) -> onnx.ModelProto:
    """Returns a recorded model as ONNX, without a trace of where its operations came from.

    Raises:
        ConfigError: an operation of the model has no counterpart in ONNX.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The exporter logs which packages it lacks.
        logger.setLevel(logging.ERROR)
        try:
            model = _convert(program, inputs)
        except torch.onnx.OnnxExporterError as error:
            reason = printable(str(error.__cause__ or error).strip().partition("\n")[0])
            raise ConfigError(f"the model cannot be written as ONNX: {reason}") from error
        finally:
            logger.setLevel(level)
    _strip(model)
    model.producer_name, model.producer_version = "lightkit", __version__
    model.graph.name = "model"
    # The types of values between operations, which ONNX Runtime finds itself.
    del model.graph.value_info[:]
    _name_dimensions(model, inputs)
    return model


def read(path: Path) -> tuple[OnnxRuntime, dict[str, Any]]:
    """Returns the runtime and the metadata of an ONNX file: see `lightkit.export.open_export`."""
    try:
        with open_regular(path, _MAX_BYTES) as file:
            content = file.read()
    except DataError as error:
        raise CheckpointError(f"the export {error}") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no ONNX model: {_reason(error)}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path} is damaged or no ONNX model: it has no operation")
    _check(model, path)
    properties = {prop.key: prop.value for prop in model.metadata_props}
    if _CHECKSUM in properties and properties[_CHECKSUM] != _checksum(model):
        raise CheckpointError(f"{path} is damaged: its weights are not those that were written")
    metadata = from_json(properties.get(KEY, ""), path)
    # ONNX Runtime reads settings of the session from there.
    model.ClearField("metadata_props")
    return OnnxRuntime(model.SerializeToString(), input_specs(metadata, path), path), metadata


def _products_saturate() -> bool:
    """Returns whether ONNX Runtime's products of 8-bit integers on this processor are wrong where they are large.

    Without the instructions of VNNI, x86 processors add two products of uint8 and int8 in 16 bits, which saturate.
    """
    instructions = processor()
    return "sse4_1" in instructions and not instructions & {"avx512_vnni", "avx_vnni"}


class OnnxRuntime:
    """A `Runtime` of ONNX Runtime on the CPU, with as many threads as torch has.

    Args:
        content: a checked model.
        inputs: the forms of its inputs that its metadata give; an empty tuple takes those of the model.
        path: its file, for messages.

    Raises:
        CheckpointError: ONNX Runtime rejects the model, or its inputs and outputs are not those of an export.
    """

    def __init__(self, content: bytes, inputs: tuple[InputSpec, ...], path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = _LOG_SEVERITY
        if _products_saturate():
            # The roundings of a quantized model are computed in float32 then, as in the model.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise CheckpointError(f"{path} cannot be run by ONNX Runtime: {_reason(error)}") from error
        try:
            own = tuple(map(_spec, self._session.get_inputs()))
            if inputs and tuple(replace(spec, max_length=None) for spec in inputs) != own:
                raise ValueError("its metadata give other inputs than the model has")
            self.inputs = inputs or own
        except ValueError as error:
            raise CheckpointError(f"{path} is no export of lightkit: {printable(str(error))}") from error
        self._output = self._session.get_outputs()[0].name

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the first output: see `lightkit.export.Runtime`."""
        names = [spec.name for spec in self.inputs]
        try:
            (output,) = self._session.run([self._output], dict(zip(names, arrays, strict=True)))
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime: {_reason(error)}") from error
        if not isinstance(output, np.ndarray) or output.dtype not in (np.float32, np.float64):
            raise RuntimeError("the ONNX model returns no tensor of float32 or float64")
        return output


def _convert(program: ExportedProgram, inputs: Sequence[InputSpec]) -> onnx.ModelProto:
    from lightkit.export.recurrent import onnx_translations

    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[spec.name for spec in inputs],
        output_names=["logits"],
        custom_translation_table=onnx_translations(),
    )
    assert converted is not None
    return converted.model_proto


def _name_dimensions(model: onnx.ModelProto, inputs: Sequence[InputSpec]) -> None:
    """Gives free dimensions their names, for which torch.export has symbols such as s77."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.input, inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(size, str):
                names[dim.dim_param] = size
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)


def _spec(value: Any) -> InputSpec:
    if value.type not in _DTYPES:
        raise ValueError(f"its input {value.name} is a {value.type}, expected {' or '.join(_DTYPES)}")
    sizes = list(value.shape)
    if not sizes or isinstance(sizes[0], int):
        raise ValueError(f"the batch of its input {value.name} is fixed")
    if any(not isinstance(size, int) and size != LENGTH for size in sizes[1:]):
        raise ValueError(f"its input {value.name} has a free dimension that is not named {LENGTH}")
    return InputSpec(value.name, _DTYPES[value.type], (BATCH, *sizes[1:]))


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Rejects a model with which ONNX Runtime would read other files, repeat operations or call others' operators."""
    if len(model.functions) or len(model.training_info):
        raise CheckpointError(f"{path} has functions or training, which an export has not")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise CheckpointError(
                f"{path} has the operator {printable(node.domain)}.{printable(node.op_type)}; an export has ONNX's own "
                "operators alone"
            )
        if any(attribute.HasField("g") or len(attribute.graphs) for attribute in node.attribute):
            raise CheckpointError(
                f"{path} has the operator {printable(node.op_type)} with a graph within, which an export has not"
            )
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data):
            raise CheckpointError(f"{path} has weights in another file, and lightkit reads this file alone")
        if any(size < 0 for size in tensor.dims) or not _is_complete(tensor):
            raise CheckpointError(f"{path} is damaged: {printable(tensor.name)} has not the size that it declares")


def _is_complete(tensor: onnx.TensorProto) -> bool:
    """Returns True if the values of a tensor fill its shape."""
    count = math.prod(tensor.dims)
    if tensor.data_type not in _ITEM_SIZES:
        return False
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == count * _ITEM_SIZES[tensor.data_type]
    stored = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
    return max(map(len, stored)) == count


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Yields all tensors of a model, at any depth."""
    pending = [message]
    while pending:
        part = pending.pop()
        if isinstance(part, onnx.TensorProto):
            yield part
        else:
            pending += [value for _, values in _messages(part) for value in values]


def _strip(message: Any) -> None:
    """Removes from a model where its operations came from."""
    names = {field.name for field, _ in message.ListFields()}
    for name in names & set(_ORIGINS):
        message.ClearField(name)
    for _, values in _messages(message):
        for value in values:
            _strip(value)


def _messages(message: Any) -> Iterator[tuple[str, list[Any]]]:
    for field, value in message.ListFields():
        if field.message_type is not None:
            yield field.name, list(value) if field.is_repeated else [value]


def _checksum(model: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}\0{tensor.data_type}\0{list(tensor.dims)}\0".encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0])[:200] or type(error).__name__
