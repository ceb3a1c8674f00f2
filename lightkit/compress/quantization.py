"""Reads, writes and applies the entry of a checkpoint that says which few bits its model has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightkit._util.printable import printable
from lightkit.compress.packing import pack_weights, unpack_weights, weight_of
from lightkit.compress.quantized_weights import QuantizedWeights
from lightkit.compress.weight_formats import (
    BITS,
    QUANTIZATION_KEY,
    WeightFormat,
    quantizable_weights,
    takes_quantizer,
)
from lightkit.errors import CheckpointError
from lightkit.nn.input_quantizer import MAX_LEVEL, MIN_SCALE, InputQuantizer, attach, detach
from lightkit.nn.weight_levels import set_levels
from lightkit.ops.fake_quantize import fake_quantize_weights


def spec_of(formats: Mapping[str, WeightFormat], quantizers: Mapping[str, InputQuantizer]) -> dict[str, Any]:
    """Returns what a checkpoint has under `QUANTIZATION_KEY`: plain containers of numbers.

    Args:
        formats: the format of each weight, by name.
        quantizers: the quantizer of each layer's input, by the name of the layer.
    """
    return {
        "weights": {name: [weight_format.bits, weight_format.group_size] for name, weight_format in formats.items()},
        "inputs": {name: [q.scale, q.zero_point] for name, q in quantizers.items() if q.scale is not None},
    }


def apply_quantization(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Rounds the weights of a module and the inputs of its layers as a checkpoint says.

    Load the state dict of the checkpoint before; the function itself unpacks packed weights. The module then computes
    what the training has validated. The checkpoint is not trusted.

    Args:
        module: the module whose names the checkpoint uses.
        checkpoint: the content of the checkpoint.

    Returns:
        The integer levels, int8 of a weight's shape, and the scales, float32, of each weight by name; {} if the
        checkpoint is of a model in float.

    Raises:
        CheckpointError: the entry is none, or does not fit the module.
    """
    spec = checkpoint.get(QUANTIZATION_KEY)
    if spec is None:
        return {}
    formats, quantizers = read_spec(module, spec)
    packed = unpack_weights(checkpoint)
    parameters = {name: parameter for name, _, parameter in quantizable_weights(module)}
    for name, (integers, _) in packed.items():
        if name not in formats or integers.shape != parameters[name].shape:
            raise _misfit(name, "packed")
    with torch.no_grad():
        for name, each in packed.items():
            parameters[name].copy_(weight_of(*each))
    weights = QuantizedWeights(module, {name: value for name, value in formats.items() if name not in packed})
    weights.round()
    levels = {**weights.levels(), **packed}
    show_levels(module, levels)
    for layer in module.modules():
        detach(layer)
    for name, quantizer in quantizers.items():
        attach(module.get_submodule(name), quantizer)
    remember(module, spec, levels)
    return levels


def levels_of(checkpoint: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the levels and scales to which the weights of a checkpoint are rounded, as `apply_quantization` does.

    Args:
        checkpoint: the content of a checkpoint of a training, with weights in float; it is trusted.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (bits, group_size) in checkpoint.get(QUANTIZATION_KEY, {"weights": {}})["weights"].items():
        weight = checkpoint["state_dict"][name].detach().float().contiguous()
        rows = WeightFormat(bits, group_size).rows(weight)
        rounded = torch.empty_like(rows)
        (scales,) = fake_quantize_weights([rows], [rounded], bits)
        found[name] = (rounded / scales[:, None]).round().to(torch.int8).view(weight.shape), scales
    return found


# What modules were quantized with, for files that are written of them later.
_quantized: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]] = WeakKeyDictionary()


def remember(module: nn.Module, spec: Mapping[str, Any], levels: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Keeps what `add_quantization` writes of a module, whose weights are rounded."""
    _quantized[module] = ({name: spec[name] for name in ("weights", "inputs")}, dict(levels))


def add_quantization(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Adds the bits and ranges of a quantized module to a checkpoint with its weights, which become integers there.

    A module in float, or whose weights have changed since, changes nothing.

    Args:
        module: the module.
        checkpoint: a checkpoint with its state dict.
    """
    spec, levels = _quantized.get(module, ({}, {}))
    state = checkpoint["state_dict"]
    if levels and all(
        name in state and torch.equal(weight_of(*packed), state[name].float()) for name, packed in levels.items()
    ):
        checkpoint[QUANTIZATION_KEY] = spec
        pack_weights(checkpoint, levels)


def has_int8_rows(module: nn.Module) -> bool:
    """Returns True if `apply_quantization` gave each weight of a module 8 bits, and each of its rows one scale."""
    spec, _ = _quantized.get(module, ({}, {}))
    formats = list(spec.get("weights", {}).values())
    return bool(formats) and all(value == [8, 0] for value in formats)


def show_levels(module: nn.Module, levels: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Gives the layers of a module the levels of their rounded weights, so that an evaluation runs on integers.

    Args:
        module: the module.
        levels: the levels and scales by the name of the weight.
    """
    for name, layer, _ in quantizable_weights(module):
        if name in levels and takes_quantizer(layer):
            set_levels(layer, *levels[name])


def read_spec(module: nn.Module, spec: Any) -> tuple[dict[str, WeightFormat], dict[str, InputQuantizer]]:
    """Returns the formats of weights and the quantizers of inputs that a checkpoint's entry describes.

    Args:
        module: the module whose names the entry uses.
        spec: the entry under `QUANTIZATION_KEY`, which is not trusted.

    Raises:
        CheckpointError: the entry is no such description, or names what the module has not.
    """
    weights, inputs = (spec.get(key) if type(spec) is dict else None for key in ("weights", "inputs"))
    if type(weights) is not dict or type(inputs) is not dict:
        raise CheckpointError("the quantization of the checkpoint is damaged")
    known = {name: weight for name, _, weight in quantizable_weights(module)}
    layers = dict(module.named_modules())
    formats: dict[str, WeightFormat] = {}
    for name, value in weights.items():
        fits = name in known and type(value) is list and len(value) == 2 and all(type(x) is int for x in value)
        if not fits or value[0] not in BITS or value[1] < 0 or (value[1] > 0 and known[name].shape[-1] % value[1] != 0):
            raise _misfit(name, value)
        formats[name] = WeightFormat(*value)
    quantizers: dict[str, InputQuantizer] = {}
    for name, value in inputs.items():
        fits = name in layers and type(value) is list and len(value) == 2
        if not fits or type(value[0]) is not float or type(value[1]) is not int or not takes_quantizer(layers[name]):
            raise _misfit(name, value)
        scale, zero_point = value
        if not MIN_SCALE <= scale < 1 / MIN_SCALE or not math.isfinite(scale) or not 0 <= zero_point <= MAX_LEVEL:
            raise _misfit(name, value)
        quantizers[name] = InputQuantizer(scale, zero_point)
    return formats, quantizers


def _misfit(name: Any, value: Any) -> CheckpointError:
    shown = printable(f"{name}: {value}"[:100])
    return CheckpointError(f"the quantization of the checkpoint does not fit the model that it describes: {shown}")
