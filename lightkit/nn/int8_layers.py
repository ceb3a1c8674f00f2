"""The layers of a quantized model as those of an int8 chain."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.nn.input_quantizer import InputQuantizer, quantizer_of
from lightkit.nn.weight_levels import WeightLevels, levels_of
from lightkit.ops.int8_chain import Int8Chain, Int8Layer

# The largest bias in units of its layer's sums: the sums of 2^14 products of 8 bits still fit 32 bits beside it.
_MAX_BIAS = 2**30

# The smallest multiplier, which float32 has with all of its bits also after a division by the scale of an output.
_MIN_MULTIPLIER = 2.0**-100


class _Draft:
    """A layer of a chain while its parts are collected.

    Args:
        layer: a convolution or a linear layer.
        levels: the levels of its weight.
        quantizer: the quantizer of its input.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, levels: WeightLevels, quantizer: InputQuantizer) -> None:
        self.layer, self.levels, self.quantizer = layer, levels, quantizer
        self.norms: list[nn.BatchNorm2d] = []
        self.relu = self.pool = False

    def made(self, following: InputQuantizer | None) -> Int8Layer:
        """Returns the layer; ``following`` is the quantizer of the next one's input, None for the last layer."""
        assert self.quantizer.scale is not None
        scale = self.levels.scales.double() * self.quantizer.scale
        bias = torch.zeros_like(scale) if self.layer.bias is None else self.layer.bias.detach().double()
        levels = self.levels.levels
        for norm in self.norms:
            factor, shift = _affine(norm)
            scale, bias = scale * factor, bias * factor + shift
        # A multiplier is positive: a negative factor changes the signs of its row.
        signs = torch.where(scale < 0, -1, 1)
        # An output that a norm multiplies by nearly 0 is its bias alone.
        is_constant = (scale.abs() * _MAX_BIAS <= bias.abs()) | (scale.abs() < _MIN_MULTIPLIER)
        signs = torch.where(is_constant, 0, signs)
        levels = (levels * signs.to(torch.int8).view(-1, *(1 for _ in levels.shape[1:]))).contiguous()
        scale = torch.where(is_constant, (bias.abs() / _MAX_BIAS).clamp_min(_MIN_MULTIPLIER), scale.abs())
        output = scale if following is None else scale / float(following.scale or 1)
        settings: dict[str, Any] = {}
        if isinstance(self.layer, nn.Conv2d):
            settings = {name: _pair(getattr(self.layer, name)) for name in ("stride", "padding", "dilation")}
            settings["groups"] = self.layer.groups
        return Int8Layer(
            weight=levels,
            bias=(bias / scale).round().to(torch.int32),
            multiplier=output.float(),
            **settings,
            relu=self.relu,
            pool=self.pool,
            output_zero_point=0 if following is None else following.zero_point,
        )


def find_int8_chain(layers: Iterable[nn.Module]) -> Int8Chain | None:
    """Returns all of the layers as one operation on integers; None if one of them cannot be a part of it.

    The layers are convolutions and linear layers whose weights and inputs are rounded, each with a batch norm, a ReLU
    and a 2x2 max-pool behind it or without, and ``nn.Flatten``. Dropout is left out, as in evaluation.

    Args:
        layers: the layers in order, in evaluation mode.
    """
    drafts: list[_Draft] = []
    is_flat = False
    for layer in _unnested(layers):
        draft = drafts[-1] if drafts else None
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            # A linear layer without a flattened input would multiply its last dimension alone.
            if draft is not None and isinstance(layer, nn.Linear) != is_flat:
                return None
            is_flat = isinstance(layer, nn.Linear)
            levels, quantizer = levels_of(layer), quantizer_of(layer)
            if levels is None or quantizer is None or quantizer.scale is None or not _is_supported(layer, levels):
                return None
            drafts.append(_Draft(layer, levels, quantizer))
        elif isinstance(layer, (nn.Dropout, nn.Dropout2d, nn.Identity)):
            continue
        elif isinstance(layer, nn.Flatten):
            if draft is None or (layer.start_dim, layer.end_dim) != (1, -1):
                return None
            is_flat = True
        elif draft is None or draft.pool or is_flat != isinstance(draft.layer, nn.Linear):
            return None
        elif isinstance(layer, nn.BatchNorm2d) and not draft.relu and layer.running_mean is not None:
            draft.norms.append(layer)
        elif isinstance(layer, nn.ReLU) and not draft.relu:
            draft.relu = True
        elif isinstance(layer, nn.MaxPool2d) and _halves(layer):
            draft.pool = True
        else:
            return None
    if not drafts:
        return None
    quantizers = [*(draft.quantizer for draft in drafts[1:]), None]
    first = drafts[0].quantizer
    assert first.scale is not None
    made = [draft.made(following) for draft, following in zip(drafts, quantizers, strict=True)]
    try:
        return Int8Chain(made, first.scale, first.zero_point)
    except ValueError:
        # A layer whose sums may overflow.
        return None


def _is_supported(layer: nn.Conv2d | nn.Linear, levels: WeightLevels) -> bool:
    has_row_scales = levels.scales.dim() == 1 and len(levels.scales) == len(layer.weight)
    if not has_row_scales or len(layer._forward_pre_hooks) != 1 or layer._forward_hooks:
        return False
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def _halves(pool: nn.MaxPool2d) -> bool:
    return (
        pool.kernel_size in (2, (2, 2))
        and pool.stride in (2, (2, 2))
        and pool.padding in (0, (0, 0))
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns the factor and the summand of a batch norm in evaluation, float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _unnested(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _unnested(layer.children())
        else:
            yield layer


# The attribute of the first layer with the chain that its last call has used, and what it was made from.
_ATTRIBUTE = "_lightkit_int8_chain"


def int8_chain_of(layers: Iterable[nn.Module], input: Tensor) -> Int8Chain | None:
    """Returns the layers as one operation on integers, made at the first call; None if float must run them.

    Integers run layers in evaluation on a CPU, without autograd, whose weights have levels: see
    `lightkit.compress.apply_quantization`.

    Args:
        layers: the layers in order.
        input: the input of the first one.
    """
    if torch.is_grad_enabled() or not isinstance(input, Tensor) or not input.is_cpu or input.dtype != torch.float32:
        return None
    products = [layer for layer in _unnested(layers) if isinstance(layer, (nn.Conv2d, nn.Linear))]
    if not products or quantizer_of(products[0]) is None or any(layer.training for layer in products):
        return None
    made_from = _MadeFrom([levels_of(layer) for layer in products], [_numbers(layer) for layer in products])
    before, chain = vars(products[0]).get(_ATTRIBUTE, (None, None))
    if before is None or not before.equals(made_from):
        chain = find_int8_chain(layers)
        vars(products[0])[_ATTRIBUTE] = (made_from, chain)
    return chain


@dataclass(frozen=True)
class _MadeFrom:
    """Describes the origin of a chain: the levels of its layers, and the scales and zero points of their inputs."""

    levels: list[WeightLevels | None]
    ranges: list[tuple[float | None, int]]

    def equals(self, other: _MadeFrom) -> bool:
        # The objects themselves: weights with other levels have other objects.
        are_same = len(self.levels) == len(other.levels) and all(map(operator.is_, self.levels, other.levels))
        return are_same and self.ranges == other.ranges


def _numbers(layer: nn.Module) -> tuple[float | None, int]:
    quantizer = quantizer_of(layer)
    return (None, 0) if quantizer is None else (quantizer.scale, quantizer.zero_point)
