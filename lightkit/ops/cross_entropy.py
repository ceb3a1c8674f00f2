"""Cross-entropy of logits, with the loss and its gradient computed in one pass over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit import native

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A drop-in for :func:`torch.nn.functional.cross_entropy` on native kernels.

    With class indices :math:`t`, class weights :math:`w`, label smoothing :math:`s` and
    :math:`\text{lse} = \log \sum_c e^{z_c}`, the loss of a row of logits :math:`z` is

    .. math:: (1 - s) w_t (\text{lse} - z_t) + \frac{s}{C} \sum_c w_c (\text{lse} - z_c).

    Where a gradient is needed, the forward pass computes it too: the logits are read once and the gradient is
    written once. Half-precision logits are accumulated in float32. The result does not depend on the number
    of threads.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, float64, bfloat16, float16.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, ...)``; int64, int32 or uint8. Or class
            probabilities of the shape and dtype of ``input``.
        weight: ``(C)``, a factor for each class.
        ignore_index: rows with this target count for nothing and get gradient 0.
        reduction: ``"none"``, ``"mean"`` (over the weights of the targets) or ``"sum"``.
        label_smoothing: between 0 and 1, see [1]_.
        dtype: of the loss. Default: that of ``input``, or float32 under autocast, as torch does.

    Raises:
        IndexError: a target is outside ``[0, C)`` and not ``ignore_index``; names the row.
        ValueError: shapes that do not fit, an unknown ``reduction``.
        RuntimeError: dtypes or devices that do not fit, ``label_smoothing`` outside [0, 1].

    References:
        .. [1] Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    if dtype is None and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.float32
    if not _has_kernel(input, target):
        return cross_entropy_reference(input, target, weight, ignore_index, reduction, label_smoothing, dtype=dtype)
    return torch.ops.lightkit.cross_entropy(
        input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing, dtype
    )


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same function in terms of torch's own, for what the kernels do not cover: see `cross_entropy`."""
    logits = input if dtype is None else input.to(dtype)
    if target.is_floating_point():
        target = target.to(logits.dtype)
    elif target.dtype == torch.int32:
        target = target.long()
    if weight is not None:
        weight = weight.to(logits.dtype)
    return F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _has_kernel(input: Tensor, target: Tensor) -> bool:
    return (
        not target.is_floating_point()
        and input.dtype in _DTYPES
        and _native_available(input.device.type)
        # Transforms of torch.func cannot see through an autograd function written in C++.
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@torch.compiler.assume_constant_result
def _native_available(device_type: str) -> bool:
    return native.available(device_type)
