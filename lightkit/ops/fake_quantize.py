"""Weights rounded to the levels of a few bits, for training that foresees a quantized network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops._dispatch import kernels_apply

# The numbers of bits, and the largest integer of each.
_LEVELS = {8: 127, 4: 7, 3: 3, 2: 3}

# Below this scale a row counts as zero, as in csrc/kernels/cpu/fake_quantize.
_LEAST_SCALE = 2.0**-64

# The statistics of a row are added in this many lanes.
_SUM_LANES = 16


def fake_quantize_weights(weights: Sequence[Tensor], outputs: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Writes the weights of a model, rounded to the levels of ``bits`` bits row by row, in one native call.

    A row holds the weights of an output channel. It becomes ``q * scale`` with integers ``q``. With 8, 4 and 3 bits and
    ``n`` = 127, 7 and 3, ``scale = max|w| / n`` and ``q = clamp(rint(w / scale), -n, n)``, to the nearest even integer.

    With 2 bits the levels are -3, -1, 1 and 3 times ``scale = alpha / 3``. They follow the statistics of the row, as in
    statistics-aware weight binning (Choi et al., Bridging the Accuracy Gap for 2-bit Quantized Neural Networks, 2018):
    ``alpha = 3.2 * sqrt(mean(w^2)) - 2.1 * mean|w|``, at least ``max|w| / 16``. A weight is rounded to the nearest
    level, half-way from zero up to the outer one. There is no level 0: a 0 becomes ``scale`` with the sign of the 0.

    A row whose scale would be below ``2**-64``, such as a row of zeros, gets the scale 1 and becomes zero. With 2 bits
    it gets the scale ``2**-64`` and becomes as small as that. A row with NaN becomes NaN; so does one with an infinite
    weight, except that with 2 bits its sums may stay infinite.

    Tensors that are not contiguous are copied, except that with 8, 4 and 3 bits a ``torch.channels_last`` weight and
    output are as fast as contiguous ones. No gradient goes through the function: it is the forward pass of a
    straight-through estimator. `fake_quantize_weights_reference` takes what the kernel does not, with the same bits on
    a CPU.

    Args:
        weights: float32 tensors of one or more dimensions, ``(rows, ...)``; they are not changed.
        outputs: for each weight a float32 tensor of its shape, in other storage, which is written.
        bits: 8, 4, 3 or 2.

    Returns:
        For each weight the scales of its rows, float32 ``(rows)``.

    Raises:
        ArgumentError: ``bits`` has another value, the numbers of tensors differ, or a tensor has another dtype, device,
            shape or storage than expected.
    """
    _check_bits(bits)
    # Of many weights the first one stands for the classes of all.
    if not weights or not all(weight.is_cpu for weight in weights) or not kernels_apply(weights[0]):
        return fake_quantize_weights_reference(weights, outputs, bits)
    try:
        scales = torch.ops.lightkit._fake_quantize_weights_.default(weights, outputs, bits)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return list(scales.split_with_sizes([weight.shape[0] for weight in weights]))


@torch.no_grad()
def fake_quantize_weights_reference(weights: Sequence[Tensor], outputs: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Computes `fake_quantize_weights` in torch's operations, with the same bits on a CPU."""
    _check_bits(bits)
    if len(weights) != len(outputs):
        raise ArgumentError(
            f"fake_quantize_weights: there must be an output for each of the {len(weights)} weights, got {len(outputs)}"
        )
    for index, (weight, output) in enumerate(zip(weights, outputs, strict=True)):
        _check(index, weight, output)
    scales = []
    for weight, output in zip(weights, outputs, strict=True):
        if weight.numel() == 0:
            scales.append(weight.new_full(weight.shape[:1], _LEAST_SCALE if bits == 2 else 1.0))
            continue
        rows = weight.detach().reshape(weight.shape[0], -1)
        scale = _two_bit_scales(rows) if bits == 2 else _scales(rows, _LEVELS[bits])
        output.copy_(_rounded(rows, scale[:, None], bits).view(weight.shape))
        scales.append(scale)
    return scales


def _check_bits(bits: int) -> None:
    if bits not in _LEVELS:
        raise ArgumentError(f"fake_quantize_weights: bits must be 2, 3, 4 or 8, got {bits!r}")


def _check(index: int, weight: Tensor, output: Tensor) -> None:
    if weight.dtype != torch.float32 or weight.dim() == 0:
        raise ArgumentError(
            f"fake_quantize_weights: weight {index} must be float32 of one or more dimensions, got {weight.dtype} of "
            f"shape {tuple(weight.shape)}"
        )
    if output.dtype != torch.float32 or output.shape != weight.shape or output.device != weight.device:
        raise ArgumentError(
            f"fake_quantize_weights: output {index} must be float32 of shape {tuple(weight.shape)} on {weight.device}, "
            f"got {output.dtype} of shape {tuple(output.shape)} on {output.device}"
        )
    if weight.numel() and torch._C._is_alias_of(weight, output):  # pyright: ignore[reportAttributeAccessIssue]
        raise ArgumentError(f"fake_quantize_weights: output {index} must not share the storage of its weight")


def _scales(rows: Tensor, levels: int) -> Tensor:
    scale = rows.abs().amax(1) / levels
    return torch.where(scale < _LEAST_SCALE, 1.0, scale)


def _two_bit_scales(rows: Tensor) -> Tensor:
    columns = rows.shape[1]
    magnitudes = rows.double().abs()
    # Element i is added to lane i % 16, in order: a cumulative sum adds one after the other.
    lanes = F.pad(magnitudes, (0, -columns % _SUM_LANES)).view(rows.shape[0], -1, _SUM_LANES)
    squares, sums = (_sum_of_lanes(terms.cumsum(1)[:, -1]) for terms in (lanes * lanes, lanes))
    scale = (((squares * columns).sqrt() * 32 - sums * 21) / (30 * columns)).float()
    least = rows.abs().amax(1) / 48
    scale = torch.where(scale < least, least, scale)
    return torch.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)


def _sum_of_lanes(lanes: Tensor) -> Tensor:
    """Returns the sums of ``(rows, 16)``: the upper half is added to the lower half, again and again."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _rounded(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    if bits == 2:
        magnitude = torch.where(rows.abs() >= 2 * scale, 3 * scale, scale)
        return torch.copysign(magnitude, rows)
    return (rows / scale).round().clamp(-_LEVELS[bits], _LEVELS[bits]) * scale
