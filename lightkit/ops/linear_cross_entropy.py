"""Cross-entropy of logits that are a linear map of hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit import native
from lightkit._util.compiler import assume_constant_result
from lightkit.errors import ArgumentError
from lightkit.ops.cross_entropy import cross_entropy, cross_entropy_reference

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Bytes that a call may take beyond its inputs and results.
MEMORY_LIMIT = 64 << 20


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` that never has all the logits.

    The arguments are those of ``torch.nn.functional.linear_cross_entropy`` and of `lightkit.ops.cross_entropy`, where
    the loss is written out. The logits of a large vocabulary take more memory than all else in a training step; here
    they exist in parts that fit into ``memory_limit``, and so does their gradient.

    A reduced loss computes its gradients in the forward pass, from the logits at hand, and backward applies the
    upstream gradient; with ``reduction="none"``, and in float16, whose range wants the upstream gradient first,
    backward computes the logits anew. Every gradient is exact: nothing is left out because it is small. Half-precision
    gradients are summed in float32 and rounded once, with one exception: as in torch, bfloat16 products take a
    gradient with respect to the logits that is rounded to bfloat16, where the machine multiplies bfloat16. The result
    does not depend on the number of threads. Second derivatives go through the logits as a whole.

    Args:
        input: hidden states of shape ``(D)`` or ``(..., D)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, D)``, of the dtype of ``input``; under autocast both become its dtype. Of shape
            ``(C, d1, ..., D)`` each row of ``input`` ``(N, D)`` has a loss for every ``d1, ...``, and the logits exist.
        target: class indices of the shape of ``input`` without ``D``, of any integer type. Class probabilities
            ``(..., C)`` are taken too, but as large as the logits as they are: these exist then.
        linear_bias: ``(C)``, or ``(C, d1, ...)``, floating point.
        weight: ``(C)``, a factor for each class.
        reduction: ``"none"``, ``"mean"`` (over the weights of the targets) or ``"sum"``.
        ignore_index: rows with this target count for nothing, get gradient 0, and on a CPU take no time. Default:
            -100. Not with class probabilities.
        label_smoothing: between 0 and 1.
        options: accepted as torch's, whose choice of chunks it is: here there is ``memory_limit``.
        z_loss: coefficient of the square of the log-partition function of each row that is not ignored.
        softcap: bound of the logits; 0 for none.
        dtype: of the loss. Default: that of ``input``, or float32 under autocast.
        return_lse: return the log-partition function of each row too, 0 for ignored ones, in float32 (float64 for
            float64), of the shape of the unreduced loss. It is not differentiable.
        memory_limit: bytes beyond inputs and results; the more, the fewer logits are computed twice. On a CPU some
            4 MiB of it are for threads, which take up to 2 MB each, more than two therefore more than the limit;
            and it is exceeded where it is too small for any progress.

    Returns:
        The loss, or ``(loss, lse)`` with ``return_lse``.

    Raises:
        IndexError: a target is outside ``[0, C)`` and not ``ignore_index``; names the row.
        ArgumentError: shapes that do not fit, a negative ``softcap``, no ``memory_limit``.
        ValueError: an unknown ``reduction``.
        RuntimeError: dtypes or devices that do not fit, ``label_smoothing`` outside [0, 1].

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025; Hsu et al., Liger Kernel, 2024.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    if target.is_floating_point() and ignore_index is not None:
        raise RuntimeError(
            f"linear_cross_entropy: ignore_index is not supported for floating point target, got {ignore_index}"
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    if linear_weight.dim() > 2:
        logits = _logits_of_several(input, linear_weight, linear_bias)
        return cross_entropy(
            logits,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            dtype=dtype,
            return_lse=return_lse,
        )
    if input.dim() < 1 or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise ArgumentError(
            "linear_cross_entropy: input and linear_weight must be (..., D) and (C, D), "
            f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if target.dtype == torch.bool:
        raise RuntimeError("linear_cross_entropy: class indices must be int64, int32 or uint8, got torch.bool")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"linear_cross_entropy: the dtype of the loss must be floating point, got {dtype}")
    if input.dtype != torch.float64 and _autocast(input.device.type):
        cast = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(cast), linear_weight.to(cast)
        linear_bias = None if linear_bias is None else linear_bias.to(cast)
        dtype = torch.float32 if dtype is None else dtype
    by_index = not target.is_floating_point()
    sizes = input.shape[:-1]
    if target.shape != (sizes if by_index else (*sizes, linear_weight.shape[0])):
        what = f"indices {tuple(sizes)} or probabilities {(*sizes, linear_weight.shape[0])}"
        raise ArgumentError(f"linear_cross_entropy: the target must be {what}, got {tuple(target.shape)}")
    # The number of rows is given: where there are no features, -1 could not say it.
    rows = input.reshape(sizes.numel(), input.shape[-1])
    targets = target.reshape(sizes.numel(), *target.shape[len(sizes) :])
    numbers = (ignore_index, label_smoothing, z_loss, softcap, dtype)
    if by_index and _has_kernel(rows, linear_weight, linear_bias, weight):
        arguments = (rows, linear_weight, targets, linear_bias, weight, _REDUCTIONS[reduction])
        try:
            loss, lse = torch.ops.lightkit.linear_cross_entropy.default(*arguments, *numbers, memory_limit)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
    else:
        loss, lse = linear_cross_entropy_reference(
            rows,
            linear_weight,
            targets,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            dtype=dtype,
            return_lse=True,
        )
    if reduction == "none":
        loss = loss.reshape(sizes)
    return (loss, lse.reshape(sizes)) if return_lse else loss


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same function of ``(N, D)`` with logits as a whole, in terms of torch's own: see `linear_cross_entropy`."""
    return cross_entropy_reference(
        F.linear(input, linear_weight, None if linear_bias is None else linear_bias.to(input.dtype)),
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        dtype=dtype,
        return_lse=return_lse,
    )


def _logits_of_several(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Returns logits ``(N, C, d1, ...)`` of a weight ``(C, d1, ..., D)``."""
    sizes = linear_weight.shape[:-1]
    if input.dim() != 2 or input.shape[1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"linear_cross_entropy: for a linear_weight {tuple(linear_weight.shape)} the input must be "
            f"(N, {linear_weight.shape[-1]}), got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != sizes:
        raise RuntimeError(f"linear_cross_entropy: linear_bias must be {tuple(sizes)}, got {tuple(linear_bias.shape)}")
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(0, -2), bias).reshape(len(input), *sizes)


def _autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _has_kernel(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None) -> bool:
    tensors = [t for t in (input, linear_weight, linear_bias) if t is not None]
    return (
        input.dtype in _DTYPES
        and _native_available(input.device.type)
        # The kernels know no gradient with respect to the weights of the classes.
        and not (weight is not None and weight.requires_grad)
        # Forward-mode AD and the transforms of torch.func cannot see through an autograd function in C++.
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        # DTensor and its like bring a dispatch of their own, which does not know the op.
        and all(type(t) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(t) for t in tensors)
    )


@assume_constant_result
def _native_available(device_type: str) -> bool:
    return native.available(device_type)
