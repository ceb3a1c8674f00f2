"""Dropout whose mask a counter-based generator computes anew in backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops import _thresholds
from lightkit.ops._dispatch import DTYPES, kernels_apply

# The constants of Philox 4x32-10, and how its draws belong to elements: csrc/kernels/cpu/dropout/philox.h.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK_COUNTERS = 16
_DRAWS = 4

_LOW_HALF = 0xFFFFFFFF

# Seeds that are drawn are below this number.
_MAX_SEED = (1 << 63) - 1


def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None) -> Tensor:
    """Zeroes each element with probability ``p`` and multiplies the others by ``1 / (1 - p)``, on a native CPU kernel.

    The mask is never stored. The counter-based generator Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As
    Easy as 1, 2, 3, 2011) computes it from ``seed``, forward and again backward. The result does not depend on the
    number of threads. The generator counts the elements in the order of the input's memory: an input of
    ``torch.channels_last`` has the mask of `dropout_mask` with that memory format. An input with gaps or overlaps in
    memory, such as an expanded one, is copied to a contiguous tensor first.

    An element is zeroed if its draw, an integer of 32 bits, is below ``p * 2**32`` rounded to the nearest integer: the
    probability is that of ``p`` to 2**-33. The product with 0 is computed, as in torch: it is NaN for an infinite
    element. Half-precision data is multiplied in float32 and rounded once.

    `dropout_reference` takes calls that the kernel does not (another device, no native library, torch.func, tensor
    subclasses), with the same mask. The second derivative is exact.

    Args:
        input: floating point, of any shape and strides.
        p: the probability that an element is zeroed, from 0 to 1.
        training: False returns ``input`` itself, as ``p=0`` does.
        seed: an int64, as an int or a tensor without dimensions. None draws one from torch's default generator of the
            CPU, so that `torch.manual_seed` makes the result reproducible.

    Returns:
        A tensor like ``input``, with its memory format if ``input`` has no gaps or overlaps.

    Raises:
        ArgumentError: ``p`` is not between 0 and 1, ``input`` is not floating point, or ``seed`` is not an int64.
    """
    _check_probability(p)
    if not input.is_floating_point():
        raise ArgumentError(f"dropout: input must be floating point, got {input.dtype}")
    if not training or p == 0:
        return input
    key = _as_seed(seed)
    if not _has_kernel(input, key):
        return dropout_reference(input, p, training, seed=key)
    try:
        return torch.ops.lightkit.dropout.default(input, key, p)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def dropout_reference(
    input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """Computes `dropout` in torch's operations, with the same mask, for calls that the kernel does not take."""
    _check_probability(p)
    if not training or p == 0:
        return input
    order = _memory_order(input)
    shape = [input.shape[dim] for dim in order]
    mask = _mask(shape, p, _as_seed(seed), _multiplier_dtype(input.dtype), input.device)
    mask = mask.permute([order.index(dim) for dim in range(input.dim())])
    return (input * mask).to(input.dtype)


def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: int | Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Returns what `dropout` multiplies with: 0, or ``1 / (1 - p)`` in ``dtype``.

    Args:
        shape: the shape of the input.
        p: the probability of a 0, from 0 to 1.
        seed: the seed of the call of `dropout`.
        dtype: a floating-point dtype. `dropout` multiplies half-precision data in float32.
        memory_format: the memory format of the input, by which `dropout` counts its elements: contiguous, or
            ``torch.channels_last`` for four dimensions.

    Returns:
        A tensor of ``shape`` and ``dtype``, in ``memory_format``, on the CPU.

    Raises:
        ArgumentError: ``p`` is not between 0 and 1, or ``seed`` is not an int64.
    """
    ones = torch.ones(tuple(shape), dtype=dtype, device="cpu").contiguous(memory_format=memory_format)
    return dropout(ones, p, seed=seed)


def draw_seed() -> Tensor:
    """Returns a seed, an int64 without dimensions, from torch's default generator of the CPU."""
    # The default device may be another one, whose generator would give another seed.
    return torch.randint(_MAX_SEED, (), device="cpu")


def dropout_is_faster(input: Tensor) -> bool:
    """Returns True if `dropout` of a tensor is faster on the kernel than in torch, forward and backward together."""
    return input.is_cpu and input.dtype in (torch.float32, torch.float64) and input.numel() >= _thresholds.MIN_DROPOUT


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ArgumentError(f"dropout: p must be between 0 and 1, got {p}")


def _as_seed(seed: int | Tensor | None) -> Tensor:
    """Returns a seed as a tensor of one int64 without dimensions."""
    if seed is None:
        return draw_seed()
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ArgumentError(
                f"dropout: seed must be an int64 without dimensions, got {seed.dtype} of {tuple(seed.shape)}"
            )
        return seed
    if not -_MAX_SEED - 1 <= seed <= _MAX_SEED:
        raise ArgumentError(f"dropout: seed must be an int64, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def _has_kernel(input: Tensor, seed: Tensor) -> bool:
    return input.is_cpu and seed.is_cpu and input.layout is torch.strided and kernels_apply(input, seed)


def _memory_order(input: Tensor) -> list[int]:
    """Returns the dimensions in the order of the memory of ``input``, which is that of the op."""
    dims = list(range(input.dim()))
    if input.layout is not torch.strided or input.is_contiguous():
        return dims
    order = sorted(dims, key=input.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if input.shape[dim] != 1:
            if input.stride(dim) != expected:
                return dims
            expected *= input.shape[dim]
    return order


def _multiplier_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in DTYPES and dtype != torch.float64 else torch.float64


def _mask(shape: Sequence[int], p: float, seed: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the multipliers of contiguous elements."""
    count = 1
    for size in shape:
        count *= size
    seed = seed.to(device)
    threshold = round(p * 2**32)
    scale = 0.0 if threshold == 2**32 else 1 / (1 - p)
    kept = _draws(count, seed, device) >= threshold
    return (kept.to(dtype) * scale).view(tuple(shape))


def _draws(count: int, seed: Tensor, device: torch.device) -> Tensor:
    """Returns the draws of the first ``count`` elements, from 0 to 2**32 - 1, as int64."""
    blocks = -(-count // (_BLOCK_COUNTERS * _DRAWS))
    counter = torch.arange(blocks * _BLOCK_COUNTERS, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counter)
    words = [counter & _LOW_HALF, counter >> 32, zero, zero]
    keys = [seed & _LOW_HALF, (seed >> 32) & _LOW_HALF]
    for _ in range(_ROUNDS):
        # int64 holds the 64 bits of an unsigned product.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (second >> 32 & _LOW_HALF) ^ words[1] ^ keys[0],
            second & _LOW_HALF,
            (first >> 32 & _LOW_HALF) ^ words[3] ^ keys[1],
            first & _LOW_HALF,
        ]
        keys = [(key + weyl) & _LOW_HALF for key, weyl in zip(keys, _WEYL, strict=True)]
    # [draw, block, counter] -> [block, draw, counter].
    return torch.stack(words).view(_DRAWS, blocks, _BLOCK_COUNTERS).transpose(0, 1).reshape(-1)[:count]
