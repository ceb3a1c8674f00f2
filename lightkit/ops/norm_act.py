"""Batch normalization, residual, activation function and pool as one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops import _thresholds
from lightkit.ops._dispatch import kernels_apply
from lightkit.ops.activation import Activation, as_activation

_DTYPES = (torch.float32, torch.float64)

# The order is that of `Pool` in csrc/kernels/cpu/norm_act/shape.h.
_POOLS = (None, "max", "mean")


def norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | Activation | None = None,
    pool: str | bool | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Computes ``pool(f(batch_norm(input) + residual))`` on a native CPU kernel (Ioffe and Szegedy, 2015).

    ``f`` is an activation function, and ``pool`` a 2x2 max-pool of stride 2 or the mean of each image.

    In training each channel is normalized with its mean and its biased variance over all other dimensions, and the
    running statistics are updated in place as by `torch.nn.functional.batch_norm`, the variance with the unbiased one.
    Otherwise the running statistics are those that normalize.

    One pass over the input computes the statistics, and one computes the output. Backward is one pass that sums and one
    that writes the gradients. For backward the op keeps the input, and a bit of each value behind a ReLU or a byte of
    each output of the max-pool. With another activation function it also keeps the residual, and backward computes the
    values before the function once more; a max-pool is computed before a function that is increasing. With a mean at
    the end neither the values before it nor their gradients are stored. Sums are accumulated in blocks, which are added
    in double precision. The result does not depend on the number of threads.

    The argmax of a max-pool's window is the first of equals, and NaN goes through the function and the pool, as in
    torch. `norm_act_reference` takes calls that the kernel does not (another device or dtype, no native library, an
    empty input, torch.func, tensor subclasses). The second derivative is computed by torch's operations.
    `norm_act_is_faster` tells which calls are faster on the kernel.

    Args:
        input: ``(N, C, H, W)`` or ``(N, C)``. The kernel takes float32 and float64, and reads an input of
            ``torch.channels_last`` without a copy.
        weight: ``(C,)``, the scale of each channel; None for 1.
        bias: ``(C,)``, added to each channel; None for 0.
        running_mean: ``(C,)``; None with ``training=True`` updates nothing.
        running_var: ``(C,)``, given if and only if ``running_mean`` is.
        residual: of the shape of ``input``, added before the activation function.
        training: True normalizes with the statistics of ``input``.
        momentum: the weight of the new value in an update of the running statistics.
        eps: added to the variance.
        activation: the activation function, a name of `lightkit.ops.ACTIVATIONS` with torch's default arguments, or an
            `lightkit.ops.Activation`; None for none.
        pool: ``"max"``, or True for the same, computes a 2x2 max-pool of stride 2 at the end, of ``(N, C, H, W)``; an
            odd last row or column is dropped. ``"mean"`` computes the mean of each channel of an image, as a global
            average pool. None, or False, is no pool.
        statistics: ``(2, C)``, mean and biased variance of ``input``, if they are known; only with ``training=True``.
            The gradient is the same as if they were computed here.

    Returns:
        ``(N, C, H, W)``, or ``(N, C, H // 2, W // 2)`` with a max-pool, or ``(N, C, 1, 1)`` with a mean, which the
        kernel returns as ``torch.channels_last``; or ``(N, C)``.

    Raises:
        ArgumentError: shapes do not fit, ``activation`` or ``pool`` is unknown, there is one value per channel in
            training, images are too small for the pool, or the running statistics are missing with ``training=False``.
        RuntimeError: dtypes or devices do not fit. Without a kernel, torch's functions raise their own errors.
    """
    function, pooled = as_activation(activation), _as_pool(pool)
    tensors = [weight, bias, running_mean, running_var, residual, statistics]
    if not _has_kernel(input, *(t for t in tensors if t is not None)):
        return norm_act_reference(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            residual,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=function,
            pool=pooled,
            statistics=statistics,
        )
    try:
        return torch.ops.lightkit.norm_act.default(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            residual,
            statistics,
            training,
            momentum,
            eps,
            0 if function is None else function.code,
            0.0 if function is None else function.alpha,
            0.0 if function is None else function.beta,
            _POOLS.index(pooled),
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def norm_act_reference(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | Activation | None = None,
    pool: str | bool | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Computes `norm_act` in torch's operations, which compute the statistics anew if they are given."""
    x = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = x if residual is None else x + residual
    function = as_activation(activation)
    x = x if function is None else function(x)
    pooled = _as_pool(pool)
    if pooled == "mean":
        return x.mean((2, 3), keepdim=True)
    return F.max_pool2d(x, 2) if pooled == "max" else x


def norm_act_is_faster(
    shape: Sequence[int],
    dtype: torch.dtype,
    activation: str | Activation | None = None,
    pool: str | bool | None = None,
    residual: bool = False,
) -> bool:
    """Returns True if `norm_act`, forward and backward together, is faster on the kernel than in torch.

    In norm_act.csv of benchmarks/results the kernel is faster than torch on contiguous and on channels-last data in
    every row of float32, from 4,096 values up, with and without a residual, a ReLU and a pool: there is no limit. The
    input is that of a kernel before it, channels-last: no row has an input that is copied to channels-last first.
    `lightkit.ops._thresholds` has the limits for other activation functions.

    Args:
        shape: the shape of the input, ``(N, C, H, W)`` or ``(N, C)``.
        dtype: the dtype of the input.
        activation: the activation function that follows; None for none.
        pool: the pool that follows, as in `norm_act`.
        residual: True if a residual is added.
    """
    pooled = _as_pool(pool)
    if dtype not in _DTYPES or not (len(shape) == 4 or (len(shape) == 2 and pooled is None)):
        return False
    function = as_activation(activation)
    if function is None or function.name == "relu" or pooled is not None:
        return True
    return function.name not in _thresholds.SLOW_ACTIVATIONS


def _as_pool(pool: str | bool | None) -> str | None:
    """Returns the name of a pool; None for none."""
    named = ("max" if pool else None) if isinstance(pool, bool) else pool
    if named not in _POOLS:
        raise ArgumentError(f"pool must be None, 'max', 'mean' or a bool, got {pool!r}")
    return named


def _has_kernel(input: Tensor, *others: Tensor) -> bool:
    return (
        input.dtype in _DTYPES
        and input.dim() in (2, 4)
        and input.numel() > 0
        and all(t.is_cpu and t.layout is torch.strided and t.dtype == input.dtype for t in (input, *others))
        and kernels_apply(input, *others)
    )
