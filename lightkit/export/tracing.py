"""The recorded graph of a model, from which each format is written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightkit._util.printable import printable
from lightkit.errors import ConfigError
from lightkit.export.folding import fold_batch_norms
from lightkit.export.quantized import with_integers
from lightkit.export.recurrent import keep_recurrent
from lightkit.export.runtime import BATCH, LENGTH, InputSpec

# The sizes of free dimensions in the example; torch.export would take 0 and 1 for fixed sizes.
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 2, 5


def trace(
    model: nn.Module, inputs: Sequence[InputSpec], one_by_one: bool = False, weights: str = "float32"
) -> ExportedProgram:
    """Records the operations of a model in evaluation mode, with batch norms folded: see `lightkit.export.folding`.

    Weights without integers are float32 in the result, on the CPU. The example with which torch.export runs the model
    has zeros.

    Args:
        model: the model, which stays as it is.
        inputs: the forms of its inputs.
        one_by_one: record the model for one sample instead of for batches, with recurrent layers step by step.
        weights: as in `lightkit.export.formats.Format`.

    Raises:
        ConfigError: torch.export cannot record the model, as one whose operations depend on values.
    """
    copied = in_float32(model)
    if weights != "float32":
        with_integers(copied, getattr(torch, weights))
    copied = _Positional(copied)
    example = tuple(_example(spec, 1 if one_by_one else _EXAMPLE_BATCH) for spec in inputs)
    shapes = None if one_by_one else tuple(_dynamic_shape(spec) for spec in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            with nullcontext() if one_by_one else keep_recurrent():
                program = torch.export.export(copied, example, dynamic_shapes=shapes and (shapes,))
            module: Any = program.module(check_guards=False)
            if fold_batch_norms(module):
                program = torch.export.export(module, example, dynamic_shapes=shapes)
        except Exception as error:
            # torch.export passes on errors of any class of the model.
            reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise ConfigError(f"torch.export cannot record {type(model).__name__}: {reason}") from error
    return _without_origins(program)


def in_float32(model: nn.Module) -> nn.Module:
    """Returns a copy of a model in evaluation mode on the CPU, with floating-point tensors in float32."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


class _Positional(nn.Module):
    """Calls a model with the inputs in their order, whatever parameters its ``forward`` has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(*inputs)
        if not isinstance(output, Tensor):
            raise ValueError(f"the model returns a {type(output).__name__}, expected one tensor")
        return output


def _example(spec: InputSpec, batch: int) -> Tensor:
    length = _EXAMPLE_LENGTH if spec.max_length is None else min(_EXAMPLE_LENGTH, spec.max_length)
    sizes = {BATCH: batch, LENGTH: length}
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _dynamic_shape(spec: InputSpec) -> dict[int, Any]:
    dims: dict[int, Any] = {}
    for index, size in enumerate(spec.shape):
        if size == BATCH:
            dims[index] = Dim(BATCH, min=1)
        elif size == LENGTH and spec.max_length != 1:
            dims[index] = Dim(LENGTH, min=1, max=spec.max_length)
    return dims


def _without_origins(program: ExportedProgram) -> ExportedProgram:
    """Removes from a graph where each operation came from: lines of source files, and the names of classes."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in set(node.meta) - {"val", "tensor_meta"}:
                del node.meta[key]
    return program
