"""The operations by which other runtimes know a quantized model: integers for weights, and roundings of inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightkit.nn.input_quantizer import MAX_LEVEL, InputQuantizer, detach, quantizer_of
from lightkit.nn.weight_levels import WeightLevels, levels_of

_OPS = torch.ops.quantized_decomposed


def is_quantized(model: nn.Module) -> bool:
    """Returns True if a layer of a model rounds its input, so that rounding errors before it may grow to a level."""
    return any(quantizer_of(layer) is not None for layer in model.modules())


def with_integers(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a model show the integers of its layers to torch.export, in place; it computes the same.

    The weight of a layer becomes a buffer of integers and its dequantization, and the rounding of an input becomes a
    quantization and its dequantization, by the operations of PyTorch 2 Export Quantization [1]_. Weights whose rows
    have several scales, and those of recurrent and embedding layers, stay float32 numbers.

    Args:
        model: the model in evaluation mode.
        dtype: int8, or uint8 with the zero point 128.

    References:
        .. [1] https://docs.pytorch.org/ao/stable/pt2e_quantization/
    """
    for layer in list(model.modules()):
        quantizer, levels = quantizer_of(layer), levels_of(layer)
        if quantizer is not None and quantizer.scale is not None:
            detach(layer)
            layer.register_forward_pre_hook(_Rounding(quantizer), prepend=True)
        if levels is not None and levels.scales.shape == levels.levels.shape[:1]:
            parametrize.register_parametrization(layer, "weight", _Dequantize(levels, dtype), unsafe=True)


class _Rounding:
    """A forward pre-hook that rounds the input of a layer by a quantization and its dequantization."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        self._arguments = (quantizer.scale, quantizer.zero_point, 0, MAX_LEVEL, torch.uint8)

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        input, *others = arguments
        levels = _OPS.quantize_per_tensor(input, *self._arguments)
        return (_OPS.dequantize_per_tensor(levels, *self._arguments), *others)


class _Dequantize(nn.Module):
    """Computes the weight of a layer from its levels, whatever the float weight is."""

    levels: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, levels: WeightLevels, dtype: torch.dtype) -> None:
        super().__init__()
        zero_point = 128 if dtype == torch.uint8 else 0
        self.register_buffer("levels", (levels.levels.to(torch.int16) + zero_point).to(dtype))
        self.register_buffer("scales", levels.scales)
        self.register_buffer("zero_points", torch.full((len(levels.scales),), zero_point, dtype=torch.int64))
        self._range = (zero_point - 127, zero_point + 127, dtype)

    def forward(self, weight: Tensor) -> Tensor:
        return _OPS.dequantize_per_channel(self.levels, self.scales, self.zero_points, 0, *self._range)
