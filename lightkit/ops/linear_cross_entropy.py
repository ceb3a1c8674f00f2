"""Cross-entropy of a linear layer's logits, without all logits in memory."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError
from lightkit.ops._dispatch import REDUCTIONS, check_reduction, is_autocast_device, kernels_apply
from lightkit.ops._thresholds import MEMORY_LIMIT
from lightkit.ops.cross_entropy import cross_entropy, cross_entropy_reference


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: object = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[False] = ...,
    memory_limit: int = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: object = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[True],
    memory_limit: int = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: object = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: bool,
    memory_limit: int = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    options: object = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without all logits in memory.

    The arguments are those of ``torch.nn.functional.linear_cross_entropy`` and of `lightkit.ops.cross_entropy`, which
    has the formula of the loss. The logits of a large vocabulary take more memory than the rest of a training step;
    here the logits and their gradient exist in parts that fit ``memory_limit``.

    A reduced loss computes its gradients in the forward pass, while it has the logits, and backward applies the
    upstream gradient. backward computes the logits again with ``reduction="none"``, and in float16, whose range
    requires that the upstream gradient comes before the rounding. Gradients are exact: small ones are not left out.
    Half-precision gradients are summed in float32 and rounded once, except that bfloat16 products take, as in torch, a
    gradient of the logits that is rounded to bfloat16, if the machine multiplies bfloat16. The result does not depend
    on the number of threads. Second derivatives go through all logits.

    Args:
        input: hidden states of shape ``(D)`` or ``(..., D)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, D)``, of the dtype of ``input``; autocast casts both to its dtype. With ``(C, d1, ..., D)``
            each row of ``input`` ``(N, D)`` has a loss for every ``d1, ...``, and all logits are in memory.
        target: class indices of the shape of ``input`` without ``D``, of any integer type. With class probabilities
            ``(..., C)``, which are as large as the logits, all logits are in memory.
        linear_bias: ``(C)``, or ``(C, d1, ...)``, floating point.
        weight: ``(C)``, a factor for each class; None weights all classes equally.
        reduction: ``"none"``, ``"mean"`` (over the weights of the targets) or ``"sum"``.
        ignore_index: the target of rows that have loss 0 and gradient 0, do not count in the mean, and take no time on
            a CPU; None means -100. With class probabilities it must be None.
        label_smoothing: the label smoothing, between 0 and 1.
        options: has no effect; torch's function chooses its chunks by ``options``, this one by ``memory_limit``.
        z_loss: the coefficient of the squared log-partition function of each row that is not ignored.
        softcap: the bound of the logits; 0 sets no bound.
        dtype: the dtype of the loss. Default: the dtype of ``input``, or float32 under autocast.
        return_lse: True also returns ``lse``, the log-partition function of each row, 0 for ignored rows, in float32
            (float64 for float64), of the shape of the unreduced loss. ``lse`` is not differentiable.
        memory_limit: the number of bytes that a call may allocate beyond its inputs and results; with more bytes, the
            function computes fewer logits twice. On a CPU, 4 MiB of the limit are for threads, which take up to 2 MB
            each: more than two threads exceed the limit. The function also exceeds a limit that is too small for any
            progress.

    Returns:
        The loss, or ``(loss, lse)`` with ``return_lse``.

    Raises:
        IndexError: a target is outside ``[0, C)`` and not ``ignore_index``; the message names the row.
        ArgumentError: the shapes do not fit, ``softcap`` is negative, or ``memory_limit`` is not positive.
        ValueError: ``reduction`` is unknown.
        RuntimeError: the dtypes or devices do not fit, or ``label_smoothing`` is outside [0, 1].

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025; Hsu et al., Liger Kernel, 2024.
    """
    check_reduction(reduction)
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
    if input.dtype != torch.float64 and is_autocast_device(input.device.type):
        cast = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(cast), linear_weight.to(cast)
        linear_bias = None if linear_bias is None else linear_bias.to(cast)
        dtype = torch.float32 if dtype is None else dtype
    by_index = not target.is_floating_point()
    sizes = input.shape[:-1]
    if target.shape != (sizes if by_index else (*sizes, linear_weight.shape[0])):
        what = f"indices {tuple(sizes)} or probabilities {(*sizes, linear_weight.shape[0])}"
        raise ArgumentError(f"linear_cross_entropy: the target must be {what}, got {tuple(target.shape)}")
    # Without features, reshape could not infer the number of rows.
    rows = input.reshape(sizes.numel(), input.shape[-1])
    targets = target.reshape(sizes.numel(), *target.shape[len(sizes) :])
    numbers = (ignore_index, label_smoothing, z_loss, softcap, dtype)
    if by_index and _has_kernel(rows, linear_weight, linear_bias, weight):
        arguments = (rows, linear_weight, targets, linear_bias, weight, REDUCTIONS[reduction])
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


@overload
def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    """Computes `linear_cross_entropy` of an input ``(N, D)`` in torch's operations, with all logits in memory."""
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


def _has_kernel(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None) -> bool:
    tensors = [t for t in (input, linear_weight, linear_bias) if t is not None]
    # The kernels have no gradient with respect to the weights of the classes.
    return kernels_apply(*tensors) and not (weight is not None and weight.requires_grad)
